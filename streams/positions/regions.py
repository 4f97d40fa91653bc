"""Regions: the positions of a contiguous stream's live tokens, which stay within the length of what is in memory.

Pure numpy. Every token starts in RETAINED, at its native position ids. At the start of a turn it may move to an earlier
region, where it gets the next free coordinate (one number: only text moves). The regions are laid out one after the other,
which gives every live key its position. An evicted token leaves a gap only if its region has tokens on both sides of it.

Invariants:
* inside a region, relative positions never change;
* so one integer offset per turn and region, added to a query's native position, gives the query the right distance to
  every key of that region;
* the offset of RETAINED is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum

import numpy as np


class Region(IntEnum):
    """The regions in layout order. A token only moves towards the front."""

    SYSTEM = 0
    PINNED = 1
    SINK = 2
    TAIL = 3
    TEXT = 4
    RETAINED = 5


STATIC = tuple(Region)[: Region.RETAINED]
"""The regions that tokens move to; their keys have coordinates."""
_UNTURNED = np.iinfo(np.int64).min
"""Position of a key that has not been rotated at a coordinate yet: it differs from every real one."""


@dataclass(frozen=True)
class RegionLog:
    """The part of a StreamLog that a contiguous stream adds to native positions: M moves, and offsets of T turns.

    Attributes:
        token: int32 [M], log index of the token that moves.
        region: int8 [M], the region that it enters.
        coordinate: int32 [M], its place there.
        entry: int32 [M], the segment start at which it enters; it stays until its next entry or its expiry.
        offsets: int32 [T, 5], what a query of that turn adds to its native position ids to see the keys of that region
            at their coordinates (0 where the region is empty).
    """

    token: np.ndarray
    region: np.ndarray
    coordinate: np.ndarray
    entry: np.ndarray
    offsets: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())

    @classmethod
    def join(cls, parts: Sequence[RegionLog]) -> RegionLog:
        """Concatenate the RegionLogs of one stream's consecutive pieces."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass
class RegionBook:
    """The regions of one stream, turn by turn.

    `_region`, `_coordinate` and `_position` are aligned with the live tokens as they were when the running turn started;
    tokens that have been appended since are RETAINED.

    Attributes:
        turned: (log indices, new positions) of the live keys whose position changed since the previous turn. Positions
            are relative: RETAINED keys and queries keep their native ones, so only distances are meaningful.
    """

    turned: tuple[np.ndarray, np.ndarray] = field(
        default_factory=lambda: (np.zeros(0, np.int64), np.zeros(0, np.int64))
    )
    _region: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    _coordinate: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    _position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    _moves: list[np.ndarray] = field(default_factory=list)
    _offsets: list[np.ndarray] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of live tokens, and of what `log` would return."""
        arrays = (self._region, self._coordinate, self._position, *self.turned, *self._moves, *self._offsets)
        return sum(array.nbytes for array in arrays)

    def leave(self, stays: np.ndarray) -> np.ndarray:
        """Drop evicted tokens; `stays` is bool over the live tokens. Returns the regions of those that stay."""
        new = len(stays) - len(self._region)
        self._region = np.append(self._region, np.full(new, Region.RETAINED, np.int8))[stays]
        self._coordinate = np.append(self._coordinate, np.zeros(new, np.int64))[stays]
        self._position = np.append(self._position, np.full(new, _UNTURNED))[stays]
        return self._region

    def move(self, live: np.ndarray, region: np.ndarray, entry: int) -> None:
        """Move tokens between regions and log the moves.

        live: int64 [n], log indices of the live tokens. region: int8 [n], the region of each from log index `entry` on.
        """
        moving = region != self._region
        for r in STATIC:
            there, coming = (region == r) & ~moving, (region == r) & moving
            # Behind the last token that stays, so that coordinates keep the order in which tokens entered.
            first = self._coordinate[there].max(initial=-1) + 1
            self._coordinate[coming] = np.arange(first, first + coming.sum())
        self._region = region.copy()
        self._position[moving] = _UNTURNED
        if moving.any():
            moved = (live[moving], region[moving], self._coordinate[moving], np.full(moving.sum(), entry))
            self._moves.append(np.stack(moved).astype(np.int32))

    def settle(self, live: np.ndarray, native: np.ndarray) -> None:
        """Lay out the regions for the running turn. Called once its prefill has been appended.

        live, native: int64 [n], log indices of the live tokens and their native positions.
        """
        region = np.append(self._region, np.full(len(live) - len(self._region), Region.RETAINED, np.int8))
        first_native = native[np.flatnonzero(region == Region.RETAINED)[0]]
        # Region r covers [base, base + its extent) of the layout; its first live key, at coordinate `first`, is at base.
        first, base, extent = np.zeros(5, np.int64), np.zeros(5, np.int64), 0
        for r in STATIC:
            here = self._coordinate[self._region == r]
            base[r] = extent
            if len(here):
                first[r] = here.min()
                extent += int(here.max()) + 1 - int(here.min())
        filled = np.isin(np.arange(5), self._region)
        # A query at native position p is at extent + (p - first_native) of the layout, a key with coordinate c of region r
        # at base[r] + (c - first[r]). Their distance is p + offset - c with this offset, so keys need no new coordinate.
        offsets = np.where(filled, extent - first_native - base + first, 0)
        self._offsets.append(offsets.astype(np.int32)[None])
        static = np.flatnonzero(self._region != Region.RETAINED)
        # The same distances, seen from queries at their native positions: keys are rotated at c - offset.
        position = self._coordinate[static] - offsets[self._region[static]]
        changed = position != self._position[static]
        self._position[static] = position
        self.turned = live[static[changed]], position[changed]

    def cut(self) -> RegionLog:
        """Return what happened since the previous cut, and forget it."""
        said = self.log()
        self._moves.clear()
        self._offsets.clear()
        return said

    def log(self) -> RegionLog:
        """Return the moves and offsets since the previous cut."""
        moves = np.concatenate([np.zeros((4, 0), np.int32), *self._moves], axis=1)
        offsets = np.concatenate([np.zeros((0, 5), np.int32), *self._offsets])
        return RegionLog(moves[0], moves[1].astype(np.int8), moves[2], moves[3], offsets)

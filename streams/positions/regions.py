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
_NOWHERE = np.iinfo(np.int64).max
"""First coordinate of a region that is empty."""
_RETAINED = int(Region.RETAINED)  # numpy takes members of an IntEnum, but several times as long as plain numbers


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
        rows = stays.nonzero()[0]
        self._region = _grown(self._region, len(stays), _RETAINED)[rows]
        self._coordinate = _grown(self._coordinate, len(stays), 0)[rows]
        self._position = _grown(self._position, len(stays), _UNTURNED)[rows]
        return self._region

    def move(self, live: np.ndarray, region: np.ndarray, entry: int) -> None:
        """Move tokens between regions and log the moves.

        live: int [n], log indices of the live tokens. region: int8 [n], the region of each from log index `entry` on.
        """
        moving = region != self._region
        rows = moving.nonzero()[0]
        if not len(rows):
            return
        entered = region[rows]
        for r in set(entered.tolist()):
            # Behind the last token that stays, so that coordinates keep the order in which tokens entered.
            first = self._coordinate[(region == r) & ~moving].max(initial=-1) + 1
            coming = rows[entered == r]
            self._coordinate[coming] = np.arange(first, first + len(coming))
        self._region = region.copy()
        self._position[rows] = _UNTURNED
        moved = np.empty((4, len(rows)), np.int32)
        moved[0], moved[1], moved[2], moved[3] = live[rows], entered, self._coordinate[rows], entry
        self._moves.append(moved)

    def settle(self, live: np.ndarray, native: np.ndarray) -> None:
        """Lay out the regions for the running turn. Called once its prefill has been appended.

        live, native: int [n], log indices of the live tokens and their native positions.
        """
        moved = self._region != _RETAINED
        static = moved.nonzero()[0]
        region, coordinate = self._region[static], self._coordinate[static]
        # The first token that has not moved; all those that were appended since have not.
        first_native = int(native[len(moved) if len(static) == len(moved) else moved.argmin()])
        lowest, highest = np.full(5, _NOWHERE), np.full(5, -1)
        np.minimum.at(lowest, region, coordinate)
        np.maximum.at(highest, region, coordinate)
        # Region r covers [base, base + its extent) of the layout; its first live key, at coordinate `first`, is at base.
        bases, extent = [0] * 5, 0
        spans = list(zip(lowest.tolist(), highest.tolist(), strict=True))
        for r, (first, last) in enumerate(spans):
            bases[r] = extent
            extent += max(0, last + 1 - first)
        # A query at native position p is at extent + (p - first_native) of the layout, a key with coordinate c of region r
        # at base[r] + (c - first[r]). Their distance is p + offset - c with this offset, so keys need no new coordinate.
        offsets = np.array(
            [
                0 if last < first else extent - first_native - base + first
                for base, (first, last) in zip(bases, spans, strict=True)
            ],
            np.int32,
        )
        self._offsets.append(offsets[None])
        # The same distances, seen from queries at their native positions: keys are rotated at c - offset.
        position = coordinate - offsets[region]
        changed = (position != self._position[static]).nonzero()[0]
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


def _grown(array: np.ndarray, length: int, value: int) -> np.ndarray:
    grown = np.full(length, value, array.dtype)
    grown[: len(array)] = array
    return grown

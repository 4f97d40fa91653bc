"""Regions: where the live tokens of a contiguous stream stand, so that their positions never leave the window's length.

Pure numpy. Every token starts in RETAINED, at its native position ids; at the start of a turn it may move
to an earlier region, where it stands at the next free coordinate (one number, for text). Laid out one after the other, the
regions give every live key its position; a token leaves no gap behind unless others of its region stand on both sides of
it. Invariants: inside a region relative positions never change; so one integer offset per turn and region turns a query at
its native position into one that sees that region's keys at their coordinates; RETAINED's offset is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum

import numpy as np


class Region(IntEnum):
    """In layout order. A token only ever moves towards the front."""

    SYSTEM = 0
    PINNED = 1
    SINK = 2
    TAIL = 3
    TEXT = 4
    RETAINED = 5


STATIC = tuple(Region)[: Region.RETAINED]
"""The regions that tokens move to."""
_UNTURNED = np.iinfo(np.int64).min


@dataclass(frozen=True)
class RegionLog:
    """What a StreamLog holds of a contiguous stream besides its native positions: M moves, and offsets of T turns.

    token, entry int32 [M]: log index of the token, and the segment start at which it enters; it is there until its next
    entry or its expiry. region int8 [M]; coordinate int32 [M]. offsets int32 [T, 5]: what a query of that turn adds to its
    native position ids to see the keys of that region at their coordinates (0 where the region is empty).
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
        """Of one stream, from what it said piece by piece."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass
class RegionBook:
    """Keeps the regions of one stream, turn by turn. The first arrays are aligned with the stream's live tokens as they were
    when the running turn started: what has been appended since is RETAINED.

    turned: of the running turn, log indices of the live keys that stand elsewhere than in the turn before, and where they
    now stand, in the frame in which RETAINED keys and queries stand at their native positions (only distances matter).
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
        """Of the live tokens' arrays, and of what `log` would say."""
        arrays = (self._region, self._coordinate, self._position, *self.turned, *self._moves, *self._offsets)
        return sum(array.nbytes for array in arrays)

    def leave(self, stays: np.ndarray) -> np.ndarray:
        """Forget what leaves; stays bool over the live tokens. Returns the regions of those that stay."""
        new = len(stays) - len(self._region)
        self._region = np.append(self._region, np.full(new, Region.RETAINED, np.int8))[stays]
        self._coordinate = np.append(self._coordinate, np.zeros(new, np.int64))[stays]
        self._position = np.append(self._position, np.full(new, _UNTURNED))[stays]
        return self._region

    def move(self, live: np.ndarray, region: np.ndarray, entry: int) -> None:
        """live int64 [n]: log indices of what stays; region int8 [n]: where each is from log index `entry` on."""
        moving = region != self._region
        for r in STATIC:
            there, coming = (region == r) & ~moving, (region == r) & moving
            first = self._coordinate[there].max(initial=-1) + 1
            self._coordinate[coming] = np.arange(first, first + coming.sum())
        self._region = region.copy()
        self._position[moving] = _UNTURNED
        if moving.any():
            moved = (live[moving], region[moving], self._coordinate[moving], np.full(moving.sum(), entry))
            self._moves.append(np.stack(moved).astype(np.int32))

    def settle(self, live: np.ndarray, native: np.ndarray) -> None:
        """Lay the regions out for the turn, once its prefill is there: live, native int64 [n], log indices of the live tokens
        and their native positions.
        """
        region = np.append(self._region, np.full(len(live) - len(self._region), Region.RETAINED, np.int8))
        first_native = native[np.flatnonzero(region == Region.RETAINED)[0]]
        first, base, extent = np.zeros(5, np.int64), np.zeros(5, np.int64), 0
        for r in STATIC:
            here = self._coordinate[self._region == r]
            base[r] = extent
            if len(here):
                first[r] = here.min()
                extent += int(here.max()) + 1 - int(here.min())
        filled = np.isin(np.arange(5), self._region)
        offsets = np.where(filled, extent - first_native - base + first, 0)
        self._offsets.append(offsets.astype(np.int32)[None])
        static = np.flatnonzero(self._region != Region.RETAINED)
        position = self._coordinate[static] - offsets[self._region[static]]
        changed = position != self._position[static]
        self._position[static] = position
        self.turned = live[static[changed]], position[changed]

    def cut(self) -> RegionLog:
        """What happened since this was asked last, to be handed out and forgotten."""
        said = self.log()
        self._moves.clear()
        self._offsets.clear()
        return said

    def log(self) -> RegionLog:
        """What is held."""
        moves = np.concatenate([np.zeros((4, 0), np.int32), *self._moves], axis=1)
        offsets = np.concatenate([np.zeros((0, 5), np.int32), *self._offsets])
        return RegionLog(moves[0], moves[1].astype(np.int8), moves[2], moves[3], offsets)

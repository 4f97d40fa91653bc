"""Rows of something that is in order, as the ranges that they make up: a few, where whole turns and chunks leave.

Invariant: ranges ascend, none is empty, and no two touch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Range = tuple[int, int]
"""From a first row to the one behind the last."""


class Rows:
    """Rows [start, stop) of each range.

    Attributes:
        ranges: see the invariant.
        count: how many rows they are.
    """

    __slots__ = ("count", "ranges")

    def __init__(self, ranges: Sequence[Range] = ()) -> None:
        self.ranges = ranges
        count = 0
        for start, stop in ranges:
            count += stop - start
        self.count = count

    @classmethod
    def where(cls, mask: np.ndarray) -> Rows:
        """Return the rows in which `mask`, bool [n], is True."""
        # To find a byte takes a tenth of the time of a call of numpy.
        flags, ranges = mask.tobytes(), []
        start = flags.find(1)
        while start >= 0:
            stop = flags.find(0, start)
            stop = len(flags) if stop < 0 else stop
            ranges.append((start, stop))
            start = flags.find(1, stop)
        return cls(ranges)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Rows({list(self.ranges)})"

    def mask(self, n: int) -> np.ndarray:
        """bool [n]: True in these rows."""
        mask = np.zeros(n, bool)
        for start, stop in self.ranges:
            mask[start:stop] = True
        return mask

    def of(self, array: np.ndarray) -> np.ndarray:
        """Return these rows of an array, [count, ...]; perhaps as a view."""
        if len(self.ranges) == 1:
            start, stop = self.ranges[0]
            return array[start:stop]
        return np.concatenate([array[:0], *[array[start:stop] for start, stop in self.ranges]])

    def without(self, array: np.ndarray) -> np.ndarray:
        """Return the other rows of an array, as a copy."""
        kept, at = [], 0
        for start, stop in self.ranges:
            kept.append(array[at:start])
            at = stop
        kept.append(array[at:])
        return np.concatenate(kept)


def add_range(ranges: list[Range], start: int, stop: int) -> None:
    """Append [start, stop), which begins behind all others or where the last of them ends."""
    if start == stop:
        return
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, stop))

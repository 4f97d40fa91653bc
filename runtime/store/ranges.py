"""A set of whole numbers as ranges: as small as it has gaps, however many numbers are in it. Pure.

Invariants:
* ranges are sorted, and between two of them at least one number is missing;
* it equals the set of the numbers that were added, in whatever order they came.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

Pairs = tuple[tuple[int, int], ...]
"""Ranges by their first and last numbers, both included."""


class Ranges:
    """Whole numbers, each at most once."""

    def __init__(self, pairs: Iterable[Iterable[int]] = ()) -> None:
        """pairs: first and last number of each range, in any order. Raises ValueError for one that ends before it begins."""
        self._first: list[int] = []
        self._last: list[int] = []
        self._count = 0
        for first, last in sorted((first, last) for first, last in pairs):
            if last < first:
                raise ValueError(f"a range from {first} to {last}")
            if self._last and first <= self._last[-1] + 1:
                self._last[-1] = max(last, self._last[-1])
            else:
                self._first.append(first)
                self._last.append(last)
        self._count = sum(last - first + 1 for first, last in self.pairs)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Ranges:
        return cls((number, number) for number in numbers)

    @property
    def pairs(self) -> Pairs:
        return tuple(zip(self._first, self._last, strict=True))

    def add(self, number: int) -> None:
        """Add a number that is not there yet."""
        at = bisect_right(self._first, number)  # the range before it is at - 1
        assert not at or self._last[at - 1] < number, f"{number} is there already"
        joins_before = at > 0 and self._last[at - 1] == number - 1
        joins_after = at < len(self._first) and self._first[at] == number + 1
        if joins_before and joins_after:
            self._last[at - 1] = self._last.pop(at)
            del self._first[at]
        elif joins_before:
            self._last[at - 1] = number
        elif joins_after:
            self._first[at] = number
        else:
            self._first.insert(at, number)
            self._last.insert(at, number)
        self._count += 1

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        at = bisect_right(self._first, number)
        return at > 0 and number <= self._last[at - 1]

    def __iter__(self) -> Iterator[int]:
        for first, last in self.pairs:
            yield from range(first, last + 1)

    def __len__(self) -> int:
        return self._count

"""Columns: numbers of one length that grow at their end without copying what is there.

A stream's live tokens are such columns, and so are the numbers of its turns. All of them lie in one block, column by column:
what is done to all columns is one call.

Invariants:
* `append` costs amortised O(appended);
* a view that `column` returned cannot be written through, and does not change when rows are appended; `write` and `remove`
  work in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST = 512
"""Rows that there is room for at first."""


class Columns:
    """Columns by name, int32 [n] each."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.length = 0
        self._capacity = -1  # below any length: the first append allocates
        self._block = np.empty((len(names), 0), np.int32)
        self._data: dict[str, np.ndarray] = {}
        self._views: dict[str, np.ndarray] = {}
        self._name_rows()

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the room to grow included."""
        return self._block.nbytes

    def column(self, name: str) -> np.ndarray:
        """Return a read-only view of one column."""
        return self._views[name][: self.length]

    def append(self, count: int, **values: Any) -> None:
        """Append `count` rows. Every column must be given, as one value for all rows or as an array."""
        assert len(values) == len(self._names), "every column grows"
        stop = self.length + count
        if stop > self._capacity:
            self._grow(max(stop, 2 * self._capacity, LEAST))
        data, rows = self._data, slice(self.length, stop)
        for name, value in values.items():
            data[name][rows] = value
        self.length = stop

    def write(self, name: str, at: np.ndarray, value: Any) -> None:
        """Set the rows `at` of one column; views see the change."""
        self._data[name][at] = value

    def remove(self, rows: np.ndarray) -> None:
        """Drop these rows, int [n] ascending. What lies behind the first moves up in place: views of it change."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        stop = self.length - len(rows)
        block = self._block
        if last - first == len(rows):
            block[:, first:stop] = block[:, last : self.length]
        else:
            stays = np.ones(self.length - first, bool)
            stays[rows - first] = False
            block[:, first:stop] = block.take(stays.nonzero()[0] + first, axis=1)
        self.length = stop

    def _grow(self, capacity: int) -> None:
        """Copy the rows into a new block with room for so many."""
        block = np.empty((len(self._names), capacity), np.int32)
        block[:, : self.length] = self._block[:, : self.length]
        self._block, self._capacity = block, capacity
        self._name_rows()

    def _name_rows(self) -> None:
        readable = self._block.view()
        readable.setflags(write=False)
        self._data = dict(zip(self._names, self._block, strict=True))
        self._views = dict(zip(self._names, readable, strict=True))

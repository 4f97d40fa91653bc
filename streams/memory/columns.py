"""Columns: arrays of one length that grow at their end without copying what is there.

A stream's live tokens are such columns, and so are the numbers of its turns. Those of one dtype lie in one block, column by
column: what is done to all columns costs a call a block.

Invariants:
* `append` costs amortised O(appended);
* a view that `column` returned cannot be written through, and does not change when rows are appended; `write` and `remove`
  work in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Spec(dict[str, np.dtype[Any]]):
    """The dtypes of columns by name, and where each lies. A dtype with a shape, (k,), makes a column of [n, k].

    Attributes:
        heights: rows of each dtype's block.
        places: the block of each column, and its row there; with a shape, its rows.
        empty: the blocks of columns without rows.
    """

    def __init__(self, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        super().__init__(dtypes)
        self.heights: dict[np.dtype[Any], int] = {}
        self.places: dict[str, tuple[np.dtype[Any], int | slice]] = {}
        for name, dtype in dtypes.items():
            first = self.heights.get(dtype.base, 0)
            self.heights[dtype.base] = first + (dtype.shape[0] if dtype.shape else 1)
            self.places[name] = dtype.base, slice(first, self.heights[dtype.base]) if dtype.shape else first
        self.empty = {base: np.empty((height, 0), base) for base, height in self.heights.items()}


class Columns:
    """Columns by name."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self.length = 0
        self._capacity = -1  # below any length: the first append allocates
        self._blocks = dict(spec.empty)
        self._data: dict[str, np.ndarray] = {}
        self._views: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the room to grow included."""
        return sum(block.nbytes for block in self._blocks.values())

    def column(self, name: str) -> np.ndarray:
        """Return a read-only view of one column."""
        view = self._views.get(name)
        if view is None:
            base, at = self._spec.places[name]
            view = self._views[name] = self._blocks[base][at].T
            view.setflags(write=False)
        return view[: self.length]

    def append(self, count: int, **values: Any) -> None:
        """Append `count` rows. Every column must be given, as one value for all rows or as an array."""
        assert len(values) == len(self._spec), "every column grows"
        stop = self.length + count
        if stop > self._capacity:
            self._grow(max(stop, 2 * self._capacity, 64))
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
        if last - first == len(rows):
            for block in self._blocks.values():
                block[:, first:stop] = block[:, last : self.length]
        else:
            stays = np.ones(self.length - first, bool)
            stays[rows - first] = False
            behind = stays.nonzero()[0] + first
            for block in self._blocks.values():
                block[:, first:stop] = block.take(behind, axis=1)
        self.length = stop

    def _grow(self, capacity: int) -> None:
        """Copy the rows into new blocks with room for so many."""
        for base, block in self._blocks.items():
            self._blocks[base] = np.empty((len(block), capacity), base)
            self._blocks[base][:, : self.length] = block[:, : self.length]
        self._capacity = capacity
        # By name; views are made when they are asked for: few columns are read.
        self._data = {name: self._blocks[base][at].T for name, (base, at) in self._spec.places.items()}
        self._views = {}

"""Columns: arrays of one length that grow at their end without copying what is there.

The log of a stream and its live tokens are such columns. Those of one dtype lie in one block, column by column: what is done
to all columns costs a call a block.

A column may have a default, which stands behind the rows that were appended: what most rows have need not be written.

Invariants:
* `append` costs amortised O(appended);
* a view that `column` returned cannot be written through, and does not change when rows are appended, kept or cut; only
  `write` and `remove` work in place.
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
        fills: what every row of a block has by default, [rows, 1], for blocks with a column that has a default.
        required: the columns that have no default.
        empty: the blocks of columns without rows.
    """

    def __init__(self, dtypes: Mapping[str, np.dtype[Any]], defaults: Mapping[str, Any] | None = None) -> None:
        super().__init__(dtypes)
        self.heights: dict[np.dtype[Any], int] = {}
        self.places: dict[str, tuple[np.dtype[Any], int | slice]] = {}
        for name, dtype in dtypes.items():
            first = self.heights.get(dtype.base, 0)
            self.heights[dtype.base] = first + (dtype.shape[0] if dtype.shape else 1)
            self.places[name] = dtype.base, slice(first, self.heights[dtype.base]) if dtype.shape else first
        self.fills: dict[np.dtype[Any], np.ndarray] = {}
        for name, value in (defaults or {}).items():
            base, at = self.places[name]
            self.fills.setdefault(base, np.zeros((self.heights[base], 1), base))[at] = value
        self.required = dtypes.keys() - (defaults or {}).keys()
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
        """Append `count` rows. Every column without a default must be given, as one value for all rows or as an array."""
        assert self._spec.required <= values.keys(), "every column grows"
        stop = self.length + count
        if stop > self._capacity:
            self._fill(slice(0, self.length), self.length, max(stop, 2 * self._capacity, 64))
        data, rows = self._data, slice(self.length, stop)
        for name, value in values.items():
            data[name][rows] = value
        self.length = stop

    def write(self, name: str, at: np.ndarray, value: Any) -> None:
        """Set the rows `at` of one column; views see the change."""
        self._data[name][at] = value

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where mask, bool [n], is False. The rest is copied: earlier views do not change."""
        rows = mask.nonzero()[0]
        # With room to grow: what is dropped usually makes place for what comes, which would otherwise copy all once more.
        self._fill(rows, len(rows), len(rows) + len(rows) // 2 + 64)

    def remove(self, rows: np.ndarray) -> None:
        """Drop these rows, int [n] ascending. What lies behind the first moves up in place: views of it change."""
        assert not self._spec.fills, "rows that move up leave others than defaults behind"
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

    def cut(self, count: int) -> dict[str, np.ndarray]:
        """Remove the first `count` rows and return them as copies."""
        head = {name: self.column(name)[:count].copy() for name in self._spec}
        rest = self.length - count
        self._fill(slice(count, self.length), rest, rest)
        return head

    def _fill(self, rows: np.ndarray | slice, count: int, capacity: int) -> None:
        """Copy these rows, `count` of them, to the beginning of new blocks."""
        for base, block in self._blocks.items():
            grown = self._blocks[base] = np.empty((len(block), capacity), base)
            grown[:, :count] = block[:, rows] if isinstance(rows, slice) else block.take(rows, axis=1)
            if base in self._spec.fills:
                grown[:, count:] = self._spec.fills[base]
        self.length, self._capacity = count, capacity
        # By name; views are made when they are asked for: few columns are read.
        self._data = {name: self._blocks[base][at].T for name, (base, at) in self._spec.places.items()}
        self._views = {}

"""Columns: arrays of one length that grow at their end without copying what is there.

The log of a stream and its live tokens are such columns. Those of one dtype lie in one block, column by column: what is done
to all columns costs a call a block.

Invariants:
* `append` costs amortised O(appended);
* a view that `column` returned cannot be written through, and does not change when rows are appended, kept or cut; only
  `write` and `remove` work in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Spec = Mapping[str, np.dtype[Any]]


class Columns:
    """Columns by name. A dtype with a shape, (k,), makes a column of [n, k]."""

    def __init__(self, dtypes: Spec) -> None:
        self.length = self._capacity = 0
        heights: dict[np.dtype[Any], int] = {}
        # Column -> (its block's dtype, its row there; with a shape, its rows).
        self._places: dict[str, tuple[np.dtype[Any], int | slice]] = {}
        for name, dtype in dtypes.items():
            first = heights.get(dtype.base, 0)
            heights[dtype.base] = first + (dtype.shape[0] if dtype.shape else 1)
            self._places[name] = dtype.base, slice(first, heights[dtype.base]) if dtype.shape else first
        self._blocks = {base: np.zeros((height, 0), base) for base, height in heights.items()}
        self._name()

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
            view = self._views[name] = self._data[name].view()
            view.setflags(write=False)
        return view[: self.length]

    def append(self, count: int, **values: Any) -> None:
        """Append `count` rows. Every column must be given, as one value for all rows or as an array."""
        assert len(values) == len(self._data), "every column grows"
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
        head = {name: column[:count].copy() for name, column in self._data.items()}
        rest = self.length - count
        self._fill(slice(count, self.length), rest, rest)
        return head

    def _fill(self, rows: np.ndarray | slice, count: int, capacity: int) -> None:
        """Copy these rows, `count` of them, to the beginning of new blocks."""
        for base, block in self._blocks.items():
            self._blocks[base] = np.empty((len(block), capacity), base)
            self._blocks[base][:, :count] = block[:, rows] if isinstance(rows, slice) else block.take(rows, axis=1)
        self.length, self._capacity = count, capacity
        self._name()

    def _name(self) -> None:
        """Find the columns in the blocks, which are new. Views are made when they are asked for: few columns are read."""
        self._data = {name: self._blocks[base][at].T for name, (base, at) in self._places.items()}
        self._views: dict[str, np.ndarray] = {}

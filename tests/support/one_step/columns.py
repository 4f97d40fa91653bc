"""Columns: arrays of one length that grow at their end without copying what is there.

The log of a stream and its live tokens are such columns.

Invariants:
* `append` costs amortised O(appended);
* a view that `column` returned cannot be written through, and does not change when rows are appended, kept or cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Spec = Mapping[str, np.dtype[Any]]


class Columns:
    """Columns by name. A dtype with a shape makes a column of [n, *shape]."""

    def __init__(self, dtypes: Spec) -> None:
        self.length = 0
        self._data = {name: np.zeros(0, dtype) for name, dtype in dtypes.items()}

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the room to grow included."""
        return sum(column.nbytes for column in self._data.values())

    def column(self, name: str) -> np.ndarray:
        """Return a read-only view of one column."""
        view = self._data[name][: self.length]
        view.flags.writeable = False
        return view

    def append(self, count: int, **values: Any) -> None:
        """Append `count` rows. Every column must be given, as one value for all rows or as an array."""
        assert values.keys() == self._data.keys(), "every column grows"
        stop = self.length + count
        capacity = len(next(iter(self._data.values())))
        if stop > capacity:
            self._resize(max(stop, 2 * capacity, 64))
        for name, value in values.items():
            self._data[name][self.length : stop] = value
        self.length = stop

    def write(self, name: str, at: np.ndarray, value: Any) -> None:
        """Set the rows `at` of one column; views see the change."""
        self._data[name][at] = value

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where mask, bool [n], is False. The rest is copied: earlier views do not change."""
        self._take({name: self._data[name][: self.length][mask] for name in self._data})

    def cut(self, count: int) -> dict[str, np.ndarray]:
        """Remove the first `count` rows and return them as copies."""
        head = {name: column[:count].copy() for name, column in self._data.items()}
        self._take({name: column[count : self.length].copy() for name, column in self._data.items()})
        return head

    def _take(self, data: dict[str, np.ndarray]) -> None:
        self._data = data
        self.length = len(next(iter(data.values())))

    def _resize(self, capacity: int) -> None:
        for name, column in self._data.items():
            grown = np.zeros((capacity, *column.shape[1:]), column.dtype)
            grown[: self.length] = column[: self.length]
            self._data[name] = grown

"""The slots of one stream in the KV pool.

Invariant: a slot for every live token that was forwarded, in the order of the log.
"""

from __future__ import annotations

import numpy as np

from tests.support.one_step.columns import Columns


class SlotList:
    """Slots by log index. It knows which, and leaves allocating and freeing to the pool."""

    def __init__(self) -> None:
        self._columns = Columns({"index": np.dtype(np.int64), "slot": np.dtype(np.int64)})

    @property
    def held(self) -> np.ndarray:
        """Return slots int64 [n]. Later changes leave this view alone: `drop` makes new columns, `add` writes after its end."""
        return self._columns.column("slot")

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def add(self, start: int, slots: np.ndarray) -> None:
        """Append the slots of the tokens from log index `start` on."""
        self._columns.append(len(slots), index=np.arange(start, start + len(slots)), slot=slots)

    def drop(self, indices: np.ndarray) -> np.ndarray:
        """Forget these tokens, by ascending log index; return their slots."""
        if not len(indices):
            return np.zeros(0, np.int64)
        at, slots = self._rows(indices), self.held
        keep = np.ones(len(slots), bool)
        keep[at] = False
        self._columns.keep(keep)
        return slots[at]

    def of(self, indices: np.ndarray) -> np.ndarray:
        """Return the slots of these tokens, by ascending log index."""
        return self.held[self._rows(indices)]

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        index = self._columns.column("index")
        at = np.searchsorted(index, indices)
        assert (index[at] == indices).all(), "only forwarded live tokens have slots"
        return at

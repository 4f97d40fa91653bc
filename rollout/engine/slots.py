"""The slots of one stream in the KV pool."""

from __future__ import annotations

import numpy as np

from streams.log.columns import Columns


class SlotList:
    """The slots of one stream's forwarded live tokens, in log order."""

    def __init__(self) -> None:
        self._columns = Columns({"index": np.dtype(np.int64), "slot": np.dtype(np.int64)})

    @property
    def held(self) -> np.ndarray:
        """int64 [n], as a view that later changes leave alone."""
        return self._columns.column("slot")

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def add(self, start: int, slots: np.ndarray) -> None:
        """The tokens from log index `start` on have been given `slots`."""
        self._columns.append(len(slots), index=np.arange(start, start + len(slots)), slot=slots)

    def drop(self, indices: np.ndarray) -> np.ndarray:
        """Forget these tokens, by ascending log index; returns their slots."""
        if not len(indices):
            return np.zeros(0, np.int64)
        at, slots = self._places(indices), self.held
        keep = np.ones(len(slots), bool)
        keep[at] = False
        self._columns.keep(keep)
        return slots[at]

    def of(self, indices: np.ndarray) -> np.ndarray:
        """The slots of these tokens, by ascending log index."""
        return self.held[self._places(indices)]

    def _places(self, indices: np.ndarray) -> np.ndarray:
        index = self._columns.column("index")
        at = np.searchsorted(index, indices)
        assert (index[at] == indices).all(), "only forwarded live tokens have slots"
        return at

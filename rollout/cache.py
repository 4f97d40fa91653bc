"""KV pool: token-granular slots (page size 1) shared by all streams of one engine.

A stream is a list of slots, parallel to its live tokens; eviction gives slots back; no key or value ever moves.
Streams with contiguous positions need their keys un-rotated, too: once a turn those that stand elsewhere are rotated anew,
in place.
Invariant: a slot has one owner at a time, and is given out again only after `free`.
"""

from __future__ import annotations

import numpy as np
import torch

from streams.columns import Columns


class KVPool:
    """kv: [layers, slots, 2, kv_heads, head_dim] (key, value) in the backbone's dtype: one gather fetches both. Its keys are
    what attention reads. raw: [layers, slots, kv_heads, head_dim], un-rotated keys; None until they are needed.
    """

    def __init__(
        self,
        slots: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if slots < 1:
            raise ValueError(f"a KV pool of {slots} slots: at least one is needed (rollout.kv_memory_mb)")
        self.kv = torch.zeros((layers, slots, 2, kv_heads, head_dim), dtype=dtype, device=device)
        self.raw: torch.Tensor | None = None
        self._free = np.arange(slots - 1, -1, -1, dtype=np.int64)
        self._available = slots
        self._taken = np.zeros(slots, bool)

    @staticmethod
    def bytes_per_slot(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, raw: bool = False) -> int:
        """Bytes that one token occupies over all layers: keys, values, and un-rotated keys where they are kept (raw)."""
        return (3 if raw else 2) * layers * kv_heads * head_dim * dtype.itemsize

    def keep_raw(self) -> torch.Tensor:
        """Keep un-rotated keys from now on."""
        if self.raw is None:
            layers, slots, _, kv_heads, head_dim = self.kv.shape
            self.raw = self.kv.new_zeros((layers, slots, kv_heads, head_dim))
        return self.raw

    @property
    def capacity(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        return self._available

    def allocate(self, n: int) -> np.ndarray:
        """n free slots, int64 [n]. The engine reserves before it admits, so this never runs dry in a sound engine."""
        if n > self._available:
            raise RuntimeError(f"KV pool exhausted: {n} slots wanted, {self._available} of {self.capacity} free")
        slots = self._free[self._available - n : self._available].copy()
        self._available -= n
        assert not self._taken[slots].any(), "a slot was given out twice"
        self._taken[slots] = True
        return slots

    def free(self, slots: np.ndarray) -> None:
        assert self._taken[slots].all(), "a slot was freed that nobody holds"
        self._taken[slots] = False
        self._free[self._available : self._available + len(slots)] = slots
        self._available += len(slots)


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

"""The KV cache of one worker: a pool of token slots.

Invariants:
* a slot is free or allocated to one stream, never both;
* `kv` has the keys as attention reads them: rotated; `raw` has them as the model made them.
"""

from __future__ import annotations

import numpy as np
import torch

from streams.checkpoint.model_shape import kv_values


class KVPool:
    """Keys and values of all live tokens, by slot.

    Attributes:
        kv: [layers, slots, 2, kv_heads, head_dim] (key, value) in the backbone's dtype: one gather fetches both.
        raw: [layers, slots, kv_heads, head_dim], un-rotated keys; None until a stream needs them.
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
        self._allocated = np.zeros(slots, bool)

    @staticmethod
    def bytes_per_slot(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, raw: bool = False) -> int:
        """Return the bytes of one token over all layers: keys, values, and un-rotated keys where they are kept (raw)."""
        return kv_values(layers, kv_heads, head_dim, unrotated=raw) * dtype.itemsize

    def keep_raw(self) -> torch.Tensor:
        """Return the buffer of un-rotated keys, made at the first call."""
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
        """Return n free slots, int64 [n].

        Raises RuntimeError if there are fewer: the engine reserves before it admits, so that is an error in the engine.
        """
        if n > self._available:
            raise RuntimeError(f"KV pool exhausted: {n} slots wanted, {self._available} of {self.capacity} free")
        slots = self._free[self._available - n : self._available].copy()
        self._available -= n
        assert not self._allocated[slots].any(), "a slot was given out twice"
        self._allocated[slots] = True
        return slots

    def free(self, slots: np.ndarray) -> None:
        """Take slots int64 [n] back."""
        assert self._allocated[slots].all(), "a slot was freed that nobody holds"
        self._allocated[slots] = False
        self._free[self._available : self._available + len(slots)] = slots
        self._available += len(slots)

    def free_all(self) -> None:
        """Take every allocated slot back."""
        self.free(np.flatnonzero(self._allocated))

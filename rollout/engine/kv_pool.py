"""The KV cache of one worker: keys and values of every live token, by slot.

Invariants:
* `kv` has the keys as attention reads them: rotated; `raw` has them as the model made them;
* the last slot of the storage, `trash`, belongs to no stream: rows of the batch that have no stream write there.

Which slots a stream has is `rollout.engine.slots`' business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout.engine.slots import BlockBook, PagedBook, SlotBook
from streams.checkpoint.model_shape import kv_values


class KVPool:
    """Keys and values by slot, in the backbone's dtype.

    Attributes:
        book: who has which slots.
        kv: blocks: [layers, 2, kv_heads, slots + 1, head_dim], so that a head's keys of one stream are one piece of memory;
            pages: [layers, slots + 1, 2, kv_heads, head_dim], as paged attention kernels read it. Keys first, then values.
        raw: [layers, slots + 1, kv_heads, head_dim], un-rotated keys; None until a stream needs them.
        copied_bytes: bytes of kept keys and values that were moved within the pool, by all streams so far.
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
        paged: bool = False,
    ) -> None:
        """paged: slots of a stream may lie anywhere; otherwise they are one block, for kernels that read a range."""
        if slots < 1:
            raise ValueError(f"a KV pool of {slots} slots: at least one is needed (rollout.kv_memory_mb)")
        self.book: SlotBook = PagedBook(slots) if paged else BlockBook(slots)
        self.paged = paged
        self.trash = slots
        one = (slots + 1, 2, kv_heads, head_dim) if paged else (2, kv_heads, slots + 1, head_dim)
        self.kv = torch.zeros((layers, *one), dtype=dtype, device=device)
        self.raw: torch.Tensor | None = None
        self.copied_bytes = 0
        self._shape = (layers, slots + 1, kv_heads, head_dim)

    @staticmethod
    def bytes_per_slot(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, raw: bool = False) -> int:
        """Return the bytes of one token over all layers: keys, values, and un-rotated keys where they are kept (raw)."""
        return kv_values(layers, kv_heads, head_dim, unrotated=raw) * dtype.itemsize

    def keep_raw(self) -> torch.Tensor:
        """Return the buffer of un-rotated keys, made at the first call."""
        if self.raw is None:
            self.raw = self.kv.new_zeros(self._shape)
        return self.raw

    @property
    def capacity(self) -> int:
        """Slots that streams may have."""
        return self.book.capacity

    @property
    def available(self) -> int:
        """Slots that no stream has."""
        return self.book.available

    def keys(self, layer: int) -> torch.Tensor:
        """Return a view of one layer's keys, [slots + 1, kv_heads, head_dim]."""
        return self.kv[layer, :, 0] if self.paged else self.kv[layer, 0].transpose(0, 1)

    def values(self, layer: int) -> torch.Tensor:
        """Return a view of one layer's values, [slots + 1, kv_heads, head_dim], with the strides of its keys."""
        return self.kv[layer, :, 1] if self.paged else self.kv[layer, 1].transpose(0, 1)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write keys and values [kv_heads, N, head_dim] into slots int64 [N]."""
        kv = self.kv[layer]
        if self.paged:
            kv.index_copy_(0, slots, torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1))
        else:
            kv[0].index_copy_(1, slots, k)
            kv[1].index_copy_(1, slots, v)

    def move(self, layer: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy keys and values, and un-rotated keys, from slots to slots int64 [N]; no slot is in both."""
        dim = 0 if self.paged else 2
        self.kv[layer].index_copy_(dim, target, self.kv[layer].index_select(dim, source))
        if self.raw is not None:
            self.raw[layer].index_copy_(0, target, self.raw[layer].index_select(0, source))
        self.copied_bytes += len(source) * self.kv[layer].nbytes // self._shape[1]

    def copy(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Copy what `move` does, in all layers: of each pair from slots to slots int64 [N]; no slot is in two of them."""
        if self.paged:
            at = [torch.from_numpy(np.concatenate(slots)).to(self.kv.device) for slots in zip(*pairs, strict=True)]
            for layer in range(len(self.kv)):
                self.move(layer, *at)
            return
        for source, target in pairs:
            count, first, to = len(source), int(source[0]), int(target[0])
            assert source[-1] - first == target[-1] - to == count - 1, "a block's first tokens follow one another"
            self.kv[:, :, :, to : to + count] = self.kv[:, :, :, first : first + count]
            if self.raw is not None:
                self.raw[:, to : to + count] = self.raw[:, first : first + count]
            self.copied_bytes += count * self.kv.nbytes // self._shape[1]

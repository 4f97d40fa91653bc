"""FlashInfer's paged attention over the pool itself: page size 1, a page is a slot, nothing is gathered or padded.

Written against flashinfer-python 0.6.18; the `fa2` kernels run on every device that FlashInfer supports, with any number of
query heads per KV head.

Invariants:
* planning needs lengths and slots on the host: it reads them back once per decode step, and so is not captured;
* slot lists are copied to the device once per forward and serve every layer;
* decoding has a wrapper of its own: the kernel's tile is chosen from the mean number of queries.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout.attention.segments import Segment
from rollout.engine.kv_pool import KVPool
from streams.backbone.kernel_choice import FLASHINFER_WORKSPACE, find_ninja, missing_for_flashinfer

if TYPE_CHECKING:
    from rollout.attention import Attend


class FlashInferBackend:
    """Attention over one engine's pool, which must keep pages; owns the workspace. groups: query heads per KV head."""

    captures = False

    def __init__(self, pool: KVPool, groups: int) -> None:
        assert pool.paged, "a page is a slot"
        prepare_compiler()
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

        self.pool = pool
        _, _, _, kv_heads, head_dim = pool.kv.shape
        self._heads, self._kv_heads, self._head_dim = groups * kv_heads, kv_heads, head_dim
        # Forwards run one after the other on one stream, so both wrappers may use it.
        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=pool.kv.device)
        # The kernel for decode without tensor cores exists for few ratios of heads only.
        self._decode = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
        # Both parts of a forward are planned before the first runs: a wrapper each.
        self._prefill = [BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2") for _ in range(2)]
        self._planned = torch.cuda.Event()
        self.scaling = head_dim**-0.5
        # Kernels are compiled when they are first planned: minutes, which would count towards some group's deadline.
        self.segments([Segment(0, 1, np.arange(1)), Segment(1, 2, np.arange(2))])
        self._plan_decode(np.arange(1), np.array([1]))

    def segments(self, segments: list[Segment]) -> Attend:
        # The wrappers send their plans from page-locked buffers, which must not be written to before those have left.
        self._planned.synchronize()
        # Called once for each part of a forward, in turn.
        self._prefill.reverse()
        wrapper = self._prefill[0]
        pages = self._pages(np.concatenate([s.slots for s in segments]), np.array([len(s.slots) for s in segments]))
        queries = _offsets(np.array([s.rows for s in segments]))
        # Causal is aligned to the end: a segment's own tokens are the last of its slots.
        wrapper.plan(queries, *pages, self._heads, self._kv_heads, self._head_dim, 1, causal=True, **self._settings())
        self._planned.record()
        return _FlashInferAttention(self.pool, wrapper, self.scaling)

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> Attend:
        self._planned.synchronize()
        counts = lengths.cpu().numpy()
        rows = table[seats].cpu().numpy()
        self._plan_decode(np.concatenate([row[:n] for row, n in zip(rows, counts, strict=True)]), counts)
        self._planned.record()
        return _FlashInferAttention(self.pool, self._decode, self.scaling)

    def _plan_decode(self, slots: np.ndarray, counts: np.ndarray) -> None:
        heads = (self._heads, self._kv_heads, self._head_dim)
        self._decode.plan(*self._pages(slots, counts), *heads, 1, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "pos_encoding_mode": "NONE",
            "sm_scale": self.scaling,
            "q_data_type": self.pool.kv.dtype,
            "kv_data_type": self.pool.kv.dtype,
        }

    def _pages(self, slots: np.ndarray, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(offsets on the host, slots on the device, filled tokens of each last page on the host), all int32."""
        pages = _to_device(slots.astype(np.int32), self.pool.kv.device)
        return _offsets(counts), pages, torch.ones(len(counts), dtype=torch.int32)


def prepare_compiler() -> None:
    """Put ninja on the PATH, by which FlashInfer calls it. Raises ValueError naming everything that compiling lacks here."""
    missing = missing_for_flashinfer()
    if missing:
        raise ValueError(f"rollout.attention=flashinfer cannot run here: {missing}; use rollout.attention=torch")
    ninja = find_ninja()
    if ninja is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(ninja).parent)])


class _FlashInferAttention:
    """One planned wrapper over the pool."""

    def __init__(self, pool: KVPool, wrapper: Any, scaling: float) -> None:
        self._pool, self._wrapper, self._scaling = pool, wrapper, scaling

    def __call__(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [H, N, D] -> [N, H, D]."""
        assert abs(scaling - self._scaling) < 1e-9, "planned with the usual scale, 1 / sqrt(head dimension)"
        # [slots, 2, 1, H_kv, D]: FlashInfer's own layout of keys and values together, at one token per page.
        return self._wrapper.run(q.transpose(0, 1).contiguous(), self._pool.kv[layer].unsqueeze(2))


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    """int32 [n + 1] on the host."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Through page-locked memory: copies from elsewhere may wait for the device."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)

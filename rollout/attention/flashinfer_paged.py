"""FlashInfer's paged attention over the pool itself: page size 1, a page is a slot, nothing is gathered or padded.

Written against flashinfer-python 0.6.18; the `fa2` kernels run on every device that FlashInfer supports, with any number of
query heads per KV head.

Invariants:
* everything that a step must know is known on the host (lengths and slots): planning never waits for the device;
* slot lists are copied to the device once per step and serve every layer;
* decode segments (one token) and longer ones are planned apart: the kernel's tile is chosen from the mean length.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout.attention.segments import Segment
from rollout.engine.kv_pool import KVPool
from streams.backbone.kernel_choice import FLASHINFER_WORKSPACE, find_ninja, missing_for_flashinfer


class FlashInferBackend:
    """Plans for one engine's pool; owns the workspace. groups: query heads per KV head."""

    def __init__(self, pool: KVPool, groups: int) -> None:
        prepare_compiler()
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

        self.pool = pool
        _, _, _, kv_heads, head_dim = pool.kv.shape
        self._heads, self._kv_heads, self._head_dim = groups * kv_heads, kv_heads, head_dim
        # Steps run one after the other on one stream, so both wrappers may use it.
        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=pool.kv.device)
        # The kernel for decode without tensor cores exists for few ratios of heads only.
        self._decode = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        self._planned = torch.cuda.Event()
        self.scaling = head_dim**-0.5
        # Kernels are compiled when they are first planned: minutes, which would count towards some group's deadline.
        self.plan(np.arange(3), [Segment(0, 1, np.arange(1)), Segment(1, 2, np.arange(2))])

    def plan(self, new_slots: np.ndarray, segments: list[Segment]) -> FlashInferPlan:
        # The wrappers send their plans from page-locked buffers, which must not be written to before those have left.
        self._planned.synchronize()
        device = self.pool.kv.device
        decode = [s for s in segments if s.rows == 1]
        prefill = [s for s in segments if s.rows > 1]
        parts = [_Part(_rows(part, device), wrapper) for part, wrapper in self._plan_parts(decode, prefill)]
        self._planned.record()
        return FlashInferPlan(self.pool, _to_device(new_slots, device), parts, self.scaling)

    def _plan_parts(self, decode: list[Segment], prefill: list[Segment]) -> list[tuple[list[Segment], Any]]:
        planned: list[tuple[list[Segment], Any]] = []
        heads = (self._heads, self._kv_heads, self._head_dim)
        settings: dict[str, Any] = {
            "pos_encoding_mode": "NONE",
            "sm_scale": self.scaling,
            "q_data_type": self.pool.kv.dtype,
            "kv_data_type": self.pool.kv.dtype,
        }
        if decode:
            self._decode.plan(*self._pages(decode), *heads, 1, **settings)
            planned.append((decode, self._decode))
        if prefill:
            queries = _offsets([s.rows for s in prefill])
            # Causal is aligned to the end: a segment's own tokens are the last of its slots.
            self._prefill.plan(queries, *self._pages(prefill), *heads, 1, causal=True, **settings)
            planned.append((prefill, self._prefill))
        return planned

    def _pages(self, segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(offsets on the host, slots on the device, filled tokens of each last page on the host), all int32."""
        slots = np.concatenate([s.slots for s in segments]).astype(np.int32)
        offsets = _offsets([len(s.slots) for s in segments])
        return offsets, _to_device(slots, self.pool.kv.device), torch.ones(len(segments), dtype=torch.int32)


def prepare_compiler() -> None:
    """Put ninja on the PATH, by which FlashInfer calls it. Raises ValueError naming everything that compiling lacks here."""
    missing = missing_for_flashinfer()
    if missing:
        raise ValueError(f"rollout.attention=flashinfer cannot run here: {missing}; use rollout.attention=torch")
    ninja = find_ninja()
    if ninja is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(ninja).parent)])


@dataclass(frozen=True)
class _Part:
    """rows int64 [N]: which tokens of the packed row the planned wrapper serves, in its order."""

    rows: torch.Tensor
    wrapper: Any


class FlashInferPlan:
    """Writes the step's new keys and values into the pool, then attends over it."""

    def __init__(self, pool: KVPool, new_slots: torch.Tensor, parts: list[_Part], scaling: float) -> None:
        self.pool, self.new_slots, self.parts, self.scaling = pool, new_slots, parts, scaling

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [1, H, N, D], k and v [1, H_kv, N, D] of the packed row -> [1, N, H, D]."""
        assert abs(scaling - self.scaling) < 1e-9, "planned with the usual scale, 1 / sqrt(head dimension)"
        pool = self.pool.kv[layer]
        pool.index_copy_(0, self.new_slots, torch.stack((k[0].transpose(0, 1), v[0].transpose(0, 1)), dim=1))
        # [slots, 2, 1, H_kv, D]: FlashInfer's own layout of keys and values together, at one token per page.
        pages = pool.unsqueeze(2)
        packed = q[0].transpose(0, 1).contiguous()
        if len(self.parts) == 1:
            # Segments follow one another without gaps: the part is the whole row.
            return self.parts[0].wrapper.run(packed, pages)[None]
        out = torch.empty_like(packed)
        for part in self.parts:
            out.index_copy_(0, part.rows, part.wrapper.run(packed[part.rows], pages))
        return out[None]


def _offsets(lengths: list[int]) -> torch.Tensor:
    """int32 [n + 1] on the host."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _rows(segments: list[Segment], device: torch.device) -> torch.Tensor:
    return _to_device(np.concatenate([np.arange(s.start, s.start + s.rows) for s in segments]), device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Through page-locked memory: copies from elsewhere may wait for the device."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)

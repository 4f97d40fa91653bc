"""Attention backends of the engine: each turns a list of segments into a plan that the backbone runs.

`torch` runs everywhere; `flashinfer` on CUDA in half precision. `streams.backbone.kernel_choice` chooses.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rollout.attention.segments import Segment
from rollout.attention.torch_sdpa import TorchBackend
from rollout.engine.kv_pool import KVPool
from streams.backbone.attention import AttentionPlan

__all__ = ["AttentionBackend", "Segment", "make_backend"]


class AttentionBackend(Protocol):
    """What an engine holds as long as it lives: the pool's attention, with whatever memory it needs besides."""

    def plan(self, new_slots: np.ndarray, segments: list[Segment]) -> AttentionPlan:
        """One step. new_slots int64 [N]: where the keys and values of the packed row's N tokens go."""
        ...


def make_backend(name: str, pool: KVPool, groups: int) -> AttentionBackend:
    """name: as `streams.backbone.kernel_choice.choose_rollout_attention` chose it; groups: query heads per KV head."""
    if name == "torch":
        return TorchBackend(pool, groups)
    # Imported here: the package compiles kernels, and most machines lack it.
    from rollout.attention.flashinfer_paged import FlashInferBackend

    return FlashInferBackend(pool, groups)

"""Decoding through a kernel of our own, which a CUDA graph can hold: it is planned by nothing and reads no length back.

It reads blocks and pages alike. Prefill is another backend's, whose kind of pool it works on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rollout.attention.segments import Segment
from rollout.attention.triton_kernel import decode_attention
from rollout.engine.kv_pool import KVPool

if TYPE_CHECKING:
    from rollout.attention import Attend, AttentionBackend


class TritonDecodeBackend:
    """Attention over one engine's pool. prefill: the backend for everything but decoding, on the same pool."""

    def __init__(self, pool: KVPool, prefill: AttentionBackend) -> None:
        self._pool, self._prefill = pool, prefill

    def segments(self, segments: list[Segment]) -> Attend:
        return self._prefill.segments(segments)

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> Attend:
        def attend(layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
            return decode_attention(q, self._pool.keys(layer), self._pool.values(layer), table, seats, lengths, scaling)

        return attend

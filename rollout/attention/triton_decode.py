"""Decoding through a kernel of our own, which a CUDA graph can hold: it is planned by nothing and reads no length back.

It reads blocks and pages alike. Prefill is another backend's, whose kind of pool it works on.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from rollout.attention.segments import Segment
from rollout.attention.triton_kernel import decode_attention
from rollout.engine.kv_pool import KVPool

if TYPE_CHECKING:
    from rollout.attention import Attend, AttentionBackend


class TritonDecodeBackend:
    """Attention over one engine's pool.

    Raises ValueError if the kernels cannot be compiled here, or want more than the device has.
    """

    captures = True

    def __init__(self, pool: KVPool, prefill: AttentionBackend, groups: int) -> None:
        """prefill: the backend for everything but decoding, on the same pool. groups: query heads per KV head."""
        self._pool, self._prefill = pool, prefill
        *_, heads, dim = pool.keys(0).shape
        one = torch.zeros(1, dtype=torch.int64, device=pool.kv.device)
        query = pool.kv.new_zeros((heads * groups, 1, dim))
        try:
            # Now and not in some group's first step, whose deadline compiling would count towards.
            self.decode(one[None] + pool.trash, one, one + 1)(0, query, dim**-0.5)
        # What Triton says itself, the driver, or the C compiler that builds the launcher.
        except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise ValueError(
                f"Triton's decode kernel cannot be compiled for heads of {dim} in {pool.kv.dtype}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def segments(self, segments: list[Segment]) -> Attend:
        return self._prefill.segments(segments)

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> Attend:
        def attend(layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
            return decode_attention(q, self._pool.keys(layer), self._pool.values(layer), table, seats, lengths, scaling)

        return attend

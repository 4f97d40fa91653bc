"""Attention backends of the engine: who of a packed row attends to which slots of the pool.

`torch` runs everywhere; `flashinfer` on CUDA in half precision; `triton` decodes on CUDA, beside one of them that does the
rest. `streams.backbone.kernel_choice` chooses.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from rollout.attention.segments import Segment
from rollout.attention.torch_sdpa import TorchBackend
from rollout.engine.kv_pool import KVPool
from streams.backbone.kernel_choice import Choice

__all__ = ["Attend", "AttentionBackend", "Segment", "make_backend", "with_decode"]

log = logging.getLogger(__name__)


class Attend(Protocol):
    """The attention of one forward, layer by layer; the rows' own keys and values are in the pool already."""

    def __call__(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [H, N, D] -> [N, H, D]."""
        ...


class AttentionBackend(Protocol):
    """What an engine holds as long as it lives: the pool's attention, with whatever memory it needs besides.

    Attributes:
        captures: whether `decode` and what it returns read nothing back to the host, so that a CUDA graph can hold them.
    """

    captures: bool

    def segments(self, segments: list[Segment]) -> Attend:
        """Plan rows that follow one another as segments, each of which sees slots of its own."""
        ...

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> Attend:
        """Plan one row for each of n streams.

        table: int64 [all seats, width], the slots of each seat, of which row i sees the first `lengths[i]` of seat
        `seats[i]`, in any order, its own among them. seats, lengths: int64 [n]. As long as it is given the same `seats`, the
        same object, their rows of the table are what they were.
        """
        ...


def make_backend(name: str, pool: KVPool, groups: int) -> AttentionBackend:
    """name: as `streams.backbone.kernel_choice.choose_rollout_attention` chose it; groups: query heads per KV head."""
    if name == "torch":
        return TorchBackend(pool, groups)
    # Imported here: the package compiles kernels, and most machines lack it.
    from rollout.attention.flashinfer_paged import FlashInferBackend

    return FlashInferBackend(pool, groups)


def with_decode(
    decode: Choice, prefill: Choice, backend: AttentionBackend, pool: KVPool, groups: int
) -> tuple[AttentionBackend, Choice]:
    """Return what decodes as chosen and leaves the rest to the prefill's backend, and the choice.

    Where Triton was `auto`'s choice and cannot compile, that is the prefill's backend, and a warning says why. Raises
    ValueError where it was asked for by name.
    """
    if decode.name != "triton":
        return backend, decode
    # Imported here: Triton is not everywhere, and it decides as it is imported whether it interprets.
    from rollout.attention.triton_decode import TritonDecodeBackend

    try:
        return TritonDecodeBackend(pool, backend, groups), decode
    except ValueError as error:
        if decode.why != "auto":
            raise ValueError(f"{decode.why} cannot run here: {error}; use rollout.attention={prefill.name}") from error
        log.warning("rollout.attention: %s decodes instead of triton: %s", prefill.name, error)
        return backend, Choice(prefill.name, str(error))

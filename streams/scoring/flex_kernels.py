"""Which blocks FlexAttention's kernels use on a GPU: Inductor's own, or smaller ones where those need more shared memory.

Inductor chooses blocks by device, dtype and head dimension, and one choice is compiled. In float32 with heads of 128, a block
of keys and one of values take up to 32 KiB each and are held several times over: more than many GPUs have.

Invariants:
* forward and backward are tried at a small length, with the heads, dtype and gradients of the real ones: what a kernel needs
  of shared memory does not depend on the length;
* only a lack of shared memory leads to smaller blocks, every other failure is raised;
* float32 is computed in float32 (never TF32), as the dense mask's attention is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from streams.backbone.backbone import Backbone
from streams.scoring.block_mask import BLOCK
from streams.scoring.compiled import can_compile, compiled
from streams.scoring.mask import block_mask

log = logging.getLogger("sightline.scoring")

Options = tuple[tuple[str, Any], ...]
"""Kernel options of FlexAttention, as pairs."""

TRIAL_TOKENS = 5 * BLOCK
EXACT: Options = (("FLOAT32_PRECISION", "'ieee'"),)
"""Whatever the process allows for other products; with the quotes that Inductor's template expects."""


def _blocks(side: int, stages: int) -> Options:
    backward = tuple((f"bwd_BLOCK_{name}", min(side, 16)) for name in ("M1", "N1", "M2", "N2"))
    stage = (("fwd_num_stages", stages), ("bwd_num_stages", 1))
    return (("fwd_BLOCK_M", side), ("fwd_BLOCK_N", side), *backward, *stage)


CANDIDATES: tuple[Options, ...] = ((), _blocks(32, 2), _blocks(32, 1), _blocks(16, 1))
"""Blocks in the order of their speed; the first are Inductor's own."""


@dataclass(frozen=True)
class Heads:
    """What a kernel is compiled for. lse: whether it also returns the log-sum-exp. gradients: whether it has a backward."""

    query: int
    kv: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    lse: bool
    gradients: bool

    @classmethod
    def of(cls, backbone: Backbone, *, lse: bool) -> Heads:
        """Return those of the text model, with gradients if they are enabled now."""
        kv, dim = backbone.kv_shape
        query = int(backbone.model.config.text_config.num_attention_heads)
        return cls(query, kv, dim, backbone.dtype, backbone.device, lse, torch.is_grad_enabled())

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} heads of {self.dim}"


@cache
def flex_options(heads: Heads) -> Options | None:
    """Return the kernel options to run such heads with; None if no blocks fit. Tried once for each kind, and said in the log.

    Raises what a kernel raises for another reason than shared memory.
    """
    if heads.device.type != "cuda" or not can_compile(heads.device, heads.dtype, lse=heads.lse):
        return ()
    return first_that_fits(heads, lambda options: try_kernels(heads, options))


def first_that_fits(heads: Heads, attempt: Callable[[Options], None]) -> Options | None:
    """Return the first of CANDIDATES that `attempt` does not refuse for lack of shared memory; None if it refuses all."""
    exact = EXACT if heads.dtype == torch.float32 else ()
    for blocks in CANDIDATES:
        try:
            attempt(exact + blocks)
        except _failures() as error:
            if not lacks_shared_memory(error):
                raise
            continue
        if blocks:
            shown = ", ".join(f"{name}={value}" for name, value in blocks)
            log.warning("FlexAttention: %s need more shared memory than this GPU has; smaller blocks: %s", heads, shown)
        return exact + blocks
    log.warning(
        "FlexAttention: no blocks for %s fit the shared memory of this GPU; the dense mask is used instead, which takes "
        "memory by the square of a row (learner.row_tokens)",
        heads,
    )
    return None


def try_kernels(heads: Heads, options: Options) -> None:
    """Run forward, and backward if there is one, on TRIAL_TOKENS zeros.

    The call looks to the compiler as that of `FlexPlan` does, so what is compiled here serves the rows that follow.
    """
    q, k, v = (
        torch.zeros(
            (1, n, TRIAL_TOKENS, heads.dim), device=heads.device, dtype=heads.dtype, requires_grad=heads.gradients
        )
        for n in (heads.query, heads.kv, heads.kv)
    )
    ends = torch.full((1, TRIAL_TOKENS), TRIAL_TOKENS)
    mask = block_mask(ends, torch.zeros_like(ends), heads.device)
    attention: Any = compiled(flex_attention)
    more = {"return_aux": AuxRequest(lse=True)} if heads.lse else {}
    with torch.set_grad_enabled(heads.gradients):
        found = attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=heads.dim**-0.5,
            enable_gqa=heads.query != heads.kv,
            kernel_options=dict(options) or None,
            **more,
        )
        out = found[0] if heads.lse else found
        if heads.gradients:
            torch.autograd.grad(out.sum(), (q, k, v))
    # A kernel that cannot be launched is heard of when it has run.
    if heads.device.type == "cuda":
        torch.cuda.synchronize(heads.device)


def lacks_shared_memory(error: BaseException) -> bool:
    """Whether Triton refused the kernel for its shared memory: in its own words, however Inductor has wrapped them."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if "out of resource" in text and "shared memory" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _failures() -> tuple[type[Exception], ...]:
    """What Inductor raises, and Triton's own error where Triton is installed."""
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, OutOfResources)

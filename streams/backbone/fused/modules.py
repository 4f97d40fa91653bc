"""The same modules and weights of the text model, of which some compute in another way: with fewer kernels.

Invariants:
* parameters, their names and where they lie stay as they are: state dict, exports and swaps of weights know nothing of it;
* a module's weights are used inside its own call, where ZeRO-3 gathers them;
* the vision tower is left alone.
"""

from __future__ import annotations

import logging
import math
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from streams.backbone.attention import _planned_attention
from streams.backbone.kernel_choice import Choice, choose_fused_kernels

log = logging.getLogger(__name__)


def settle_fused_kernels(asked: str, device: str, dtype: str) -> Choice:
    """Choose `triton`, `torch` or `off`, and see that Triton can compile for the device. device: "cuda" or "cpu".

    Raises ValueError if it was asked for by name and cannot run; under `auto` a warning says why it gives way to torch.
    """
    choice = choose_fused_kernels(asked, device, dtype)
    if choice.name != "triton":
        return choice
    try:
        _try_out(torch.device(device), getattr(torch, dtype))
    except ValueError as error:
        if choice.why != "auto":
            raise ValueError(f"{choice.why} cannot run here: {error}; use model.fused_kernels=torch") from error
        log.warning("model.fused_kernels: torch instead of triton: %s", error)
        return Choice("torch", str(error))
    return choice


def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if the kernels cannot be compiled here: now, and not in some group's first step."""
    # Imported here: Triton is not everywhere, and it decides as it is imported whether it interprets.
    from triton.errors import TritonError

    from streams.backbone.fused import kernels as fused_kernels

    row = torch.zeros((1, 1, 2, 16), dtype=dtype, device=device)
    try:
        fused_kernels.rms_norm(row, row[0, 0, 0], 1e-6)
        fused_kernels.rotate(row, row, row[:, :, 0], row[:, :, 0])
        fused_kernels.silu_times(row, row)
    # What Triton says itself, the driver, or the C compiler that builds the launcher.
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"Triton's kernels cannot be compiled in {dtype}: {type(error).__name__}: {error}") from error


class Kernels(NamedTuple):
    """What a text model computes between its matrix products, as `streams.backbone.fused.kernels` has it."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    silu_times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    for x in (q, k):
        half = x.shape[-1] // 2
        turned = torch.empty_like(x)
        torch.neg(x[..., half:], out=turned[..., :half])
        turned[..., half:] = x[..., :half]
        x.mul_(cos[:, :, None]).add_(turned.mul_(sin[:, :, None]))
    return q, k


def _silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate, inplace=True).mul_(up)


IN_PLACE = Kernels(_rms_norm, _rotate, _silu_times)
"""The modules' own operations, written into what was just computed: fewer passes over memory, the same bits, no gradient."""


MOST_KEPT = 64 * 2**20
"""Bytes of each kept output, at most: more than an engine's prefill writes, less than scoring a long stream may."""


class _Kept(threading.local):
    """Memory of the wide outputs of gated units, which all layers write one after the other. Each thread has its own.

    On a CPU: memory of this size goes back to the system when it is freed, and to get it anew, page by page, takes a third of
    the time of the product that fills it. A GPU's allocator keeps it by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def out(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return an output of this shape, valid until the next one of this name; None if it is too large to keep."""
        size = math.prod(shape)
        if size * dtype.itemsize > MOST_KEPT:
            return None
        kept = self._kept.get(name)
        if kept is None or kept.dtype != dtype or len(kept) < size:
            kept = self._kept[name] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)


def _into(kept: _Kept, name: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer that writes into what is kept."""
    if x.device.type == "cpu" and module.bias is None:
        out = kept.out(name, (*x.shape[:-1], module.out_features), x.dtype)
        if out is not None:
            torch.mm(x.flatten(0, -2), module.weight.t(), out=out.flatten(0, -2))
            return out
    return F.linear(x, module.weight, module.bias)


def fuse(text: Any, name: str) -> None:
    """Let a text model of transformers (Qwen2.5-VL or Qwen3-VL) normalise, rotate and gate by other kernels.

    name: `triton`, or `torch`, under which a forward with gradient runs the modules as they are. The units of a model that
    are not gated by SiLU stay as they are.
    """
    kernels, compute = IN_PLACE, _without_gradient
    if name == "triton":
        from streams.backbone.fused import kernels as fused_kernels

        kernels = Kernels(fused_kernels.rms_norm, fused_kernels.rotate, fused_kernels.silu_times)
        compute = _always
    kept = _Kept()
    for layer in text.layers:
        compute(layer.self_attn, partial(_attend, kernels))
        if text.config.hidden_act == "silu":
            compute(layer.mlp, partial(_gated, kernels))
            if name == "torch":
                compute(layer.mlp.gate_proj, partial(_into, kept, "gate"))
                compute(layer.mlp.up_proj, partial(_into, kept, "up"))
    norm = type(text.norm)
    for module in text.modules():
        if isinstance(module, norm):
            compute(module, partial(_norm, kernels))


def _always(module: Any, forward: Callable[..., Any]) -> None:
    # On the instance: another model in this process may keep the modules' own.
    module.forward = partial(forward, module)


def _without_gradient(module: Any, forward: Callable[..., Any]) -> None:
    module.forward = partial(_unless_gradient, forward, module)


def _unless_gradient(forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return type(module).forward(module, *args, **kwargs)
    return forward(module, *args, **kwargs)


def _norm(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    return kernels.rms_norm(x, module.weight, module.variance_epsilon)


def _gated(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(kernels.silu_times(module.gate_proj(x), module.up_proj(x)))


def _attend(
    kernels: Kernels,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    q, k, v = (p(hidden_states).view(heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = kernels.rotate(q, k, *position_embeddings)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed, _ = _planned_attention(module, q, k, v, attention_mask, module.scaling, **kwargs)
    return module.o_proj(mixed.flatten(2)), None

"""The text model with fewer kernels: the same modules and weights, of which some compute in another way.

Invariants:
* parameters, their names and where they lie stay as they are: state dict, exports and swaps of weights know nothing of it;
* a module's weights are used inside its own call, where ZeRO-3 gathers them;
* the vision tower is left alone.
"""

from __future__ import annotations

import logging
import subprocess
from functools import partial
from typing import Any

import torch
from torch import nn

from streams.backbone.attention import _planned_attention
from streams.backbone.kernel_choice import Choice, choose_fused_kernels

log = logging.getLogger(__name__)


def settle_fused_kernels(asked: str, device: str, dtype: str) -> Choice:
    """Choose `triton` or `off`, and see that Triton can compile for the device. device: "cuda" or "cpu".

    Raises ValueError if they were asked for by name and cannot run; under `auto` a warning says why they are off.
    """
    choice = choose_fused_kernels(asked, device, dtype)
    if choice.name == "off":
        return choice
    try:
        _try_out(torch.device(device), getattr(torch, dtype))
    except ValueError as error:
        if choice.why != "auto":
            raise ValueError(f"{choice.why} cannot run here: {error}; use model.fused_kernels=off") from error
        log.warning("model.fused_kernels: off: %s", error)
        return Choice("off", str(error))
    return choice


def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if the kernels cannot be compiled here: now, and not in some group's first step."""
    # Imported here: Triton is not everywhere, and it decides as it is imported whether it interprets.
    from triton.errors import TritonError

    from streams.backbone import fused_kernels

    row = torch.zeros((1, 1, 2, 16), dtype=dtype, device=device)
    try:
        fused_kernels.rms_norm(row, row[0, 0, 0], 1e-6)
        fused_kernels.rotate(row, row, row[:, :, 0], row[:, :, 0])
        fused_kernels.silu_times(row, row)
    # What Triton says itself, the driver, or the C compiler that builds the launcher.
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"Triton's kernels cannot be compiled in {dtype}: {type(error).__name__}: {error}") from error


def fuse(text: Any) -> None:
    """Let a text model of transformers (Qwen2.5-VL or Qwen3-VL) normalise, rotate and gate by `streams.backbone.fused_kernels`.

    Raises ValueError for an activation other than SiLU.
    """
    from streams.backbone import fused_kernels

    if text.config.hidden_act != "silu":
        raise ValueError(
            f"text_config.hidden_act={text.config.hidden_act!r}: the fused kernels know silu; use model.fused_kernels=off"
        )

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return fused_kernels.rms_norm(x, module.weight, module.variance_epsilon)

    def gated(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(fused_kernels.silu_times(module.gate_proj(x), module.up_proj(x)))

    def attend(
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
        q, k = fused_kernels.rotate(q, k, *position_embeddings)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed, _ = _planned_attention(module, q, k, v, attention_mask, module.scaling, **kwargs)
        return module.o_proj(mixed.flatten(2)), None

    for layer in text.layers:
        _compute(layer.self_attn, attend)
        _compute(layer.mlp, gated)
    norm_type = type(text.norm)
    for module in text.modules():
        if isinstance(module, norm_type):
            _compute(module, norm)


def _compute(module: nn.Module, forward: Any) -> None:
    # On the instance: another model in this process may keep the modules' own.
    module.forward = partial(forward, module)

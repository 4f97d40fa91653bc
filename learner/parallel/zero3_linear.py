"""The linear layer of ZeRO-3, rounded as torch's own is.

At stage 3 DeepSpeed replaces `torch.nn.functional.linear` for the whole process. Its version gathers a weight again in
the backward pass instead of keeping it.

Invariants:
- The output is bit for bit that of torch's linear layer, which the engine uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return inputs @ weight.T + bias, [..., O], from inputs [..., I], weight [O, I], bias [O]."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if inputs.dim() < 3:
        return zero3_linear_wrap(inputs, weight, bias)
    # With more than two dimensions DeepSpeed adds the bias after the product has been rounded, torch before. In
    # bfloat16 all queries, keys and values of Qwen2.5 would differ from the engine's by half a unit in the last place.
    return zero3_linear_wrap(inputs.flatten(0, -2), weight, bias).unflatten(0, inputs.shape[:-1])


def replace_deepspeed_linear() -> None:
    """Replace DeepSpeed's linear layer, if it is installed, by `linear`, until the process ends."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if F.linear is zero3_linear_wrap:
        F.linear = linear  # type: ignore[assignment]

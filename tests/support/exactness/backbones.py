"""Tiny backbones with loud weights, of both families, for proofs that engine and learner agree.

Loud weights (Xavier gain 2, embeddings of std 1) matter: with default initialisation real mask defects
hide under 1e-4. Invariant: the patch of the norms ends with its context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec
from streams.layout.layout import LayoutConfig

# Heads of Qwen3-VL are wider than hidden / heads, as in its real checkpoints.
SPECS = {"qwen2_5_vl": TinySpec(), "qwen3_vl": replace(QWEN3_SPEC, head_dim=48)}
MODEL_TYPES = tuple(SPECS)

WORDS = ("red", "green", "nothing", " answer", "\n", "\n\n", " red", ".")


def loud_backbone(
    folder: Path,
    dtype: torch.dtype,
    spec: TinySpec | str = "qwen2_5_vl",
    layout: LayoutConfig | None = None,
    device: str = "cpu",
) -> Backbone:
    """Return a loud tiny backbone that may only write a few words and the layout's tokens.

    With the whole vocabulary open, random weights hardly ever end a turn or decide anything by themselves.
    """
    spec = SPECS[spec] if isinstance(spec, str) else spec
    path = build_tiny(folder / "loud", spec, seed=7, gain=2.0, std=1.0)
    config = layout or LayoutConfig(think_budget=5, max_new_tokens=10)
    backbone = Backbone.load(path, config, dtype=dtype, device=device)
    tokens = backbone.layout.tokens
    allowed = {tokens.im_end, tokens.silent, tokens.response, tokens.think, tokens.think_end}
    allowed |= {token for word in WORDS for token in backbone.tokenizer.encode(word)}
    banned = tuple(i for i in range(backbone.layout.vocab_rows) if i not in allowed)
    return with_ban_list(backbone, banned)


def with_ban_list(backbone: Backbone, banned: tuple[int, ...]) -> Backbone:
    """Return the same model under another ban list."""
    layout = replace(backbone.layout)
    layout.banned = banned
    kernels = (backbone.vision_attention, backbone.fused_kernels)
    return Backbone(
        backbone.model, backbone.tokenizer, layout, backbone.image, backbone.source, backbone.processors, *kernels
    )


@contextmanager
def forward_as(classes: Sequence[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of these modules by `forward` until the context ends."""
    before = [module.forward for module in classes]
    for module in classes:
        module.forward = forward
    try:
        yield
    finally:
        for module, original in zip(classes, before, strict=True):
            module.forward = original


def norms_in_input_dtype() -> AbstractContextManager[None]:
    """Make Qwen's RMSNorm, which computes in fp32 whatever its input, compute in the input's dtype for fp64 proofs.

    Qwen3-VL's class also normalises queries and keys.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    return forward_as((Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm), forward)

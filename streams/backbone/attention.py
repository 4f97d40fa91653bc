"""The two attention functions that the backbone's modules call.

Invariant: a call without a plan, or without the spans of its frames, raises; it never means full attention.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F

ATTENTION_NAME = "sightline"


# transformers hands the spans of a packed row to implementations with "flash" in their name and loops over the spans
# for all others.
VISION_ATTENTION_NAME = "sightline_flash_spans"


VISION_IMPLEMENTATIONS = {"sdpa": VISION_ATTENTION_NAME, "flash_attn": "flash_attention_2"}
"""By the names of `streams.backbone.kernel_choice`; flash-attn comes through transformers' own implementation."""


class AttentionPlan(Protocol):
    """Who sees whom in one forward. q is [B, H, L, D]; k and v are [B, H_kv, L, D]; returns [B, L, H, D]."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor: ...


def _planned_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    plan: AttentionPlan | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if plan is None:
        raise RuntimeError("attention was called without a plan: the text model must be run through Backbone.hidden")
    return plan.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


def _vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend fully inside each span of a packed row; q, k, v [1, H, L, D] -> [1, L, H, D].

    Spans of one length share one SDPA call: a clip of small frames would otherwise cost one call per frame and layer.
    """
    if cu_seq_lens_q is None:
        raise RuntimeError("the vision tower was called without the spans of its frames")
    edges = cu_seq_lens_q.tolist()
    by_length: dict[int, list[int]] = {}
    for start, stop in pairwise(edges):
        if stop > start:
            by_length.setdefault(stop - start, []).append(start)
    if len(by_length) == 1:
        ((length, starts),) = by_length.items()
        q, k, v = (t[0].unflatten(1, (len(starts), length)).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    out = query.new_zeros((query.shape[2], query.shape[1], query.shape[3]))
    for length, starts in by_length.items():
        rows = torch.tensor(starts, device=query.device)[:, None] + torch.arange(length, device=query.device)
        q, k, v = (t[0][:, rows].transpose(0, 1) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out = out.index_put((rows.reshape(-1),), mixed.transpose(1, 2).flatten(0, 1))
    return out[None], None

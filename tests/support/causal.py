"""The attention plan of plain rows: every token sees those before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Causal:
    """As `streams.backbone.attention.AttentionPlan` has it."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2)

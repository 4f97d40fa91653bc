"""The learner's attention mask, built from stream logs: one predicate, as a dense mask and as a FlexAttention block mask.

Owner: streams.scoring. The predicate: visible(q, k) = k <= q < expiry[k] and lane[k] <= lane[q], in row coordinates.
Invariant: in a packed row the expiry of a stream's tokens is capped at the stream's end, so that causality and expiry
also keep streams apart; padding is a last stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def dense_mask(expiry: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
    """bool [R, 1, L, L] from expiry int [R, L] (row coordinates, capped) and lane int [R, L]; [.., q, k]."""
    length = expiry.shape[-1]
    index = torch.arange(length, device=expiry.device)
    causal = index[None, :] <= index[:, None]
    alive = index[None, :, None] < expiry[:, None, :]
    lanes = lane[:, None, :] <= lane[:, :, None]
    return (causal & alive & lanes)[:, None]


def mask_mod(
    expiry: torch.Tensor, lane: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same predicate as a FlexAttention mask_mod."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < expiry[b, k]) & (lane[b, k] <= lane[b, q])

    return visible


def block_mask(expiry: torch.Tensor, lane: torch.Tensor, block: int = 128) -> BlockMask:
    rows, length = expiry.shape
    return create_block_mask(
        mask_mod(expiry, lane),
        B=rows,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=expiry.device,
        BLOCK_SIZE=block,
    )


@dataclass(frozen=True)
class DensePlan:
    """SDPA with the dense mask; on CPU the learner's plan, as FlexAttention has no backward there."""

    mask: torch.Tensor

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scaling)
        return out.transpose(1, 2)


@dataclass(frozen=True)
class FlexPlan:
    """FlexAttention on the block mask of the same predicate."""

    mask: BlockMask

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        out = flex_attention(q, k, v, block_mask=self.mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

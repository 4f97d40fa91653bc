"""The learner's attention mask, built from stream logs: one predicate, as a dense mask and as a FlexAttention block mask.

The predicate: visible(q, k) = k <= q < expiry[k] and lane[k] <= lane[q], in row coordinates.
Invariants: in a packed row the expiry of a stream's tokens is capped at the stream's end, so that causality and expiry
also keep streams apart; padding is a last stream of its own. FlexAttention sees the rows of a batch end to end as one row,
by the same rule: one compiled kernel then serves any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from streams.scoring.block_mask import BLOCK, block_lists, interval_block_lists
from streams.scoring.compiled import can_compile, compiled

MIN_FLEX_TOKENS = 2 * BLOCK
"""Shortest row for FlexAttention: a single block is a shape of its own to the compiler."""


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
    """The same predicate as a FlexAttention mask_mod over one row, from expiry and lane int [L]."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < expiry[k]) & (lane[k] <= lane[q])

    return visible


def block_mask(expiry: torch.Tensor, lane: torch.Tensor, device: torch.device | None = None) -> BlockMask:
    """Of expiry and lane int [R, L], their rows end to end; for `device`, or where they are.

    Built on the host: rows that are still there reach a GPU in one copy that nobody waits for.
    """
    rows, length = expiry.shape
    starts = torch.arange(rows)[:, None] * length
    row_expiry = (expiry.cpu().clamp(max=length) + starts).flatten().to(torch.int32).numpy()
    row_lane = lane.cpu().flatten().to(torch.int32).numpy()
    lists = vars(block_lists(row_expiry, row_lane))
    found = _copied([row_expiry, row_lane, *lists.values()], device or expiry.device)
    blocks: dict[str, Any] = dict(zip(lists, found[2:], strict=True))
    return BlockMask(
        seq_lengths=(rows * length, rows * length),
        **blocks,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod(found[0], found[1]),
    )


def interval_block_mask(queries: np.ndarray, keys: np.ndarray, device: torch.device) -> BlockMask:
    """Of queries that are stacked region by region, each against keys seen for an interval: a key is visible if the regions
    are the same, entry <= place < exit, and its lane is admitted. queries int [3, N]: region, place, lane. keys int [4, K]:
    region, entry, exit, lane.
    """
    lists = vars(interval_block_lists(queries, keys))
    found = _copied([*queries.astype(np.int32), *keys.astype(np.int32), *lists.values()], device)
    region, place, lane, key_region, entry, leaves, key_lane = found[:7]

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        alive = (entry[k] <= place[q]) & (place[q] < leaves[k])
        return (region[q] == key_region[k]) & alive & (key_lane[k] <= lane[q])

    blocks: dict[str, Any] = dict(zip(lists, found[7:], strict=True))
    return BlockMask(
        seq_lengths=(queries.shape[1], keys.shape[1]), **blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible
    )


def _copied(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The int32 arrays on the device, moved there together."""
    whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    parts = whole.split([array.size for array in arrays])
    # Copies, never views: the compiler tells views apart by what they are views of.
    return [part.view(array.shape).clone() for part, array in zip(parts, arrays, strict=True)]


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
    """FlexAttention on the block mask of the same predicate, of the rows end to end. On CPU a forward only."""

    mask: BlockMask

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        attention: Any = compiled(flex_attention) if can_compile(q.device, q.dtype) else flex_attention
        out = attention(
            *(_end_to_end(t) for t in (q, k, v)),
            block_mask=self.mask,
            scale=scaling,
            enable_gqa=heads != k.shape[1],
        )
        return out[0].transpose(0, 1).unflatten(0, (rows, length))


def _end_to_end(tensor: torch.Tensor) -> torch.Tensor:
    """[R, H, L, D] -> [1, H, R * L, D], a copy: see `_copied`."""
    return tensor.transpose(0, 1).flatten(1, 2)[None].clone(memory_format=torch.contiguous_format)

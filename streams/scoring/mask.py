"""The learner's attention mask, built from stream logs: one predicate, as a dense mask and as a FlexAttention block mask.

The predicate: visible(q, k) = k <= q < expiry[k] and lane[k] <= lane[q], in row coordinates.

Invariants:
* in a packed row the expiry of a stream's tokens is capped at the stream's end, so that causality and expiry also keep
  streams apart;
* padding is a last stream of its own;
* FlexAttention sees the rows of a batch end to end as one row, by the same rule, so that one compiled kernel serves any
  number of rows.
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
    """Return the mask bool [R, 1, L, L], as [.., q, k]. expiry: int [R, L], row coordinates, capped; lane: int [R, L]."""
    length = expiry.shape[-1]
    index = torch.arange(length, device=expiry.device)
    causal = index[None, :] <= index[:, None]
    alive = index[None, :, None] < expiry[:, None, :]
    lanes = lane[:, None, :] <= lane[:, :, None]
    return (causal & alive & lanes)[:, None]


def mask_mod(
    expiry: torch.Tensor, lane: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the same predicate as a FlexAttention mask_mod over one row, from expiry and lane int [L]."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < expiry[k]) & (lane[k] <= lane[q])

    return visible


def block_mask(expiry: torch.Tensor, lane: torch.Tensor, device: torch.device | None = None) -> BlockMask:
    """Return the BlockMask of rows laid end to end, from expiry and lane int [R, L].

    device: where the mask is to be; None = where expiry is. The mask is built on the host and copied in one asynchronous
    transfer, so rows that are still on the host cost no synchronisation.
    """
    rows, length = expiry.shape
    starts = torch.arange(rows)[:, None] * length
    # Capped at its own row, then offset: end to end, a token expires before the next row begins.
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
    """Return the BlockMask of queries stacked region by region, against keys that are visible for an interval.

    A key is visible if the regions are equal, entry <= place < exit, and lane[k] <= lane[q].
    queries: int [3, N] (region, place, lane). keys: int [4, K] (region, entry, exit, lane).
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
    """Copy int32 arrays to the device in one transfer."""
    whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    parts = whole.split([array.size for array in arrays])
    # Clones, not views: the compiler guards on what a view is a view of, and would compile anew for each.
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
    """FlexAttention with the block mask of the same predicate, over the rows end to end. On CPU it has no backward.

    options: of the kernel, see `streams.scoring.flex_kernels`.
    """

    mask: BlockMask
    options: tuple[tuple[str, Any], ...] = ()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        attention: Any = compiled(flex_attention) if can_compile(q.device, q.dtype) else flex_attention
        out = attention(
            *(_end_to_end(t) for t in (q, k, v)),
            block_mask=self.mask,
            scale=scaling,
            enable_gqa=heads != k.shape[1],
            kernel_options=dict(self.options) or None,
        )
        return out[0].transpose(0, 1).unflatten(0, (rows, length))


def _end_to_end(tensor: torch.Tensor) -> torch.Tensor:
    """[R, H, L, D] -> [1, H, R * L, D], a copy: see `_copied`."""
    return tensor.transpose(0, 1).flatten(1, 2)[None].clone(memory_format=torch.contiguous_format)

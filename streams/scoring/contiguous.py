"""Attention of contiguous streams in one forward: keys at fixed angles, queries rotated anew for every region.

A RETAINED key and a query are rotated by their native positions. A key of another region is rotated by its coordinate, and
the query by its native position plus its turn's offset for that region. The model itself rotates nothing (position 0).

Invariants:
* the predicate is that of the plain mask, and a query sees a token through one key only;
* without FlexAttention there is one softmax over the scores of all regions, differentiable;
* FlexAttention takes the queries of all regions stacked, each against the blocks of its own region, and the results are
  merged by log-sum-exp: a region in which a query sees no key has weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from streams.backbone.attention import AttentionPlan
from streams.backbone.backbone import Backbone
from streams.backbone.kernel_choice import REGION_SCORES
from streams.positions.rotary import Rotary, Tables, rotated
from streams.scoring.compiled import can_compile, compiled
from streams.scoring.contiguous_rows import RegionRows
from streams.scoring.flex_kernels import Heads, Options, flex_options
from streams.scoring.mask import dense_mask, interval_block_mask
from streams.scoring.packing import Rows


def region_plan(rows: Rows, regions: RegionRows, backbone: Backbone, kind: str) -> AttentionPlan:
    """Return the plan, `sdpa` (one dense softmax) or `flex`, for packed rows with contiguous streams, on the model's device."""
    device = backbone.device
    there = regions.to(device)
    angles = _Angles.of(there, backbone.rotary, backbone.dtype)
    if kind == "flex":
        options = flex_options(Heads.of(backbone, lse=True))
        if options is not None:
            return FlexRegionPlan(angles, there, region_block_mask(rows, regions, device), options)
    return DenseRegionPlan(angles, there, _dense_mask(rows.to(device), there))


@dataclass(frozen=True)
class _Angles:
    """Rotation tables: of keys at their native positions, of copies, and of queries for RETAINED and each filled region."""

    own: Tables
    copies: Tables
    queries: tuple[Tables, ...]

    @classmethod
    def of(cls, regions: RegionRows, rotary: Rotary, dtype: torch.dtype) -> _Angles:
        def tables(positions: torch.Tensor) -> Tables:
            cos, sin = rotary.tables(positions, dtype)
            return cos[:, None], sin[:, None]

        own = tables(regions.own)
        turned = [tables(regions.own + regions.offsets[r]) for r in regions.filled]
        return cls(own, tables(regions.coordinate.expand(3, -1, -1)), (own, *turned))

    def keys(
        self, regions: RegionRows, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (keys, copies, values, values of copies), each [R, H_kv, L or M, D]."""
        index = regions.token[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return rotated(k, self.own), rotated(k.gather(2, index), self.copies), v, v.gather(2, index)


def _dense_mask(rows: Rows, regions: RegionRows) -> torch.Tensor:
    """Return the mask bool [R, 1, L, L + M]: native keys, then copies."""
    at = torch.arange(rows.ids.shape[1], device=rows.ids.device)[:, None]
    lane = rows.lane.gather(1, regions.token)
    seen = (regions.entry[:, None] <= at) & (at < regions.exit[:, None]) & (lane[:, None] <= rows.lane[:, :, None])
    return torch.cat((dense_mask(rows.expiry, rows.lane), seen[:, None]), dim=-1)


@dataclass(frozen=True)
class DenseRegionPlan:
    """One dense softmax over all regions; mask bool [R, 1, L, L + M]. SDPA returns no log-sum-exp to merge by."""

    angles: _Angles
    regions: RegionRows
    mask: torch.Tensor

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        bounds = self.regions.bounds
        keys, copies, values, copied = self.angles.keys(self.regions, k, v)
        parts = [keys, *(copies[:, :, bounds[r] : bounds[r + 1]] for r in self.regions.filled)]
        both = torch.cat((values, copied), dim=2)
        # Without a backward the scores of some queries at a time need not be kept.
        most = length if torch.is_grad_enabled() else max(1, REGION_SCORES // (rows * heads * both.shape[2]))
        some = [slice(start, start + most) for start in range(0, length, most)]
        out = torch.cat([self._attended(q, parts, both, scaling, queries) for queries in some], dim=2)
        return out.transpose(1, 2)

    def _attended(
        self, q: torch.Tensor, parts: list[torch.Tensor], values: torch.Tensor, scaling: float, some: slice
    ) -> torch.Tensor:
        """Return the attention of the queries `some` over all keys, region by region; values [R, H_kv, L + M, D]."""
        q, mask = q[:, :, some], self.mask[:, :, some]
        rows, heads, length, dim = q.shape
        scores = [
            # Query heads of one KV head become extra queries.
            (rotated(q, (cos[:, :, some], sin[:, :, some])) * scaling).reshape(rows, values.shape[1], -1, dim)
            @ part.transpose(2, 3)
            for (cos, sin), part in zip(self.angles.queries, parts, strict=True)
        ]
        by_head = torch.cat(scores, dim=-1).view(rows, heads, length, -1).masked_fill(~mask, float("-inf"))
        half = q.dtype in (torch.bfloat16, torch.float16)
        weight = by_head.softmax(dim=-1, dtype=torch.float32 if half else None).to(q.dtype)
        out = weight.view(rows, values.shape[1], -1, weight.shape[-1]) @ values
        return out.view(rows, heads, length, dim)


def region_block_mask(rows: Rows, regions: RegionRows, device: torch.device) -> BlockMask:
    """Return the BlockMask of the rows end to end: queries once per region (RETAINED first), keys, then copies."""
    count, length = rows.ids.shape
    starts = torch.arange(count)[:, None] * length
    at, lane = torch.arange(count * length), rows.lane.cpu().flatten()
    stacked = 1 + len(regions.filled)
    queries = torch.stack((torch.arange(stacked).repeat_interleave(len(at)), at.repeat(stacked), lane.repeat(stacked)))
    place = torch.zeros(regions.token.shape[1], dtype=torch.long)
    for i, r in enumerate(regions.filled):
        place[regions.bounds[r] : regions.bounds[r + 1]] = i + 1
    entry, leaves, token = (t.cpu() for t in (regions.entry, regions.exit, regions.token))
    copies = torch.stack(
        (
            place.repeat(count),
            (entry + starts).flatten(),
            (leaves + starts).flatten(),
            rows.lane.cpu().gather(1, token).flatten(),
        )
    )
    own = torch.stack((torch.zeros_like(at), at, (rows.expiry.cpu() + starts).flatten(), lane))
    return interval_block_mask(queries.numpy(), torch.cat((own, copies), dim=1).numpy(), device)


@dataclass(frozen=True)
class FlexRegionPlan:
    """FlexAttention with the block mask of stacked queries. On CPU it has no backward."""

    angles: _Angles
    regions: RegionRows
    mask: BlockMask
    options: Options = ()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        keys, copies, values, copied = self.angles.keys(self.regions, k, v)
        queries = torch.cat([_end_to_end(rotated(q, tables)) for tables in self.angles.queries], dim=2)
        attention: Any = compiled(flex_attention) if can_compile(q.device, q.dtype, lse=True) else flex_attention
        out, aux = attention(
            queries,
            torch.cat((_end_to_end(keys), _end_to_end(copies)), dim=2),
            torch.cat((_end_to_end(values), _end_to_end(copied)), dim=2),
            block_mask=self.mask,
            scale=scaling,
            enable_gqa=heads != k.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options=dict(self.options) or None,
        )
        # [H, regions, R * L, D] and [H, regions, R * L]
        parts = out[0].unflatten(1, (-1, rows * length))
        lse = aux.lse[0].unflatten(1, (-1, rows * length))
        # The weight of a region is exp(lse), normalised. A query sees itself in RETAINED, so at least one lse is finite.
        weight = lse.softmax(dim=1)[..., None]
        # The output of a query without a visible key in a region is undefined: 0 * NaN would be NaN.
        merged = (parts.masked_fill(lse.isneginf()[..., None], 0.0) * weight).sum(dim=1).to(q.dtype)
        return merged.transpose(0, 1).unflatten(0, (rows, length))


def _end_to_end(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape [R, H, L, D] to [1, H, R * L, D]."""
    return tensor.transpose(0, 1).flatten(1, 2)[None]

"""The portable backend: gathers each segment's slots, pads, and calls SDPA once per bucket and layer.

Invariants:
* segments of one token (decode) and longer ones (prefill) are padded apart: a mixed step does not pad every decode token to
  the longest prefill;
* index tensors are built once per step and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tests.support.one_step.kv_pool import KVPool


@dataclass(frozen=True)
class Segment:
    """`rows` query tokens that start at `start` in the packed forward; slots int64 [n >= rows] they may see.

    The last `rows` slots are its own tokens', in order; its i-th token attends to every slot before its own, and to its own.
    """

    start: int
    rows: int
    slots: np.ndarray


@dataclass(frozen=True)
class _Bucket:
    """S segments padded to Q queries and K keys. query int64 [S, Q], key int64 [S * K], mask [S, 1, G*Q, K]."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor
    kept: torch.Tensor
    rows: torch.Tensor


def _bucket(segments: list[Segment], groups: int, device: torch.device) -> _Bucket:
    count = len(segments)
    rows = np.array([s.rows for s in segments])
    keys = np.array([len(s.slots) for s in segments])
    width, depth = int(rows.max()), int(keys.max())
    key = np.zeros((count, depth), np.int64)
    for i, segment in enumerate(segments):
        key[i, : len(segment.slots)] = segment.slots
    offset = np.arange(width)
    starts = np.array([s.start for s in segments])
    query = starts[:, None] + np.minimum(offset, rows[:, None] - 1)
    # Query i sees the keys before its segment and its own first i + 1; padded queries repeat the last one.
    last = (keys - rows)[:, None] + np.minimum(offset, rows[:, None] - 1)
    mask = np.arange(depth)[None, None, :] <= last[:, :, None]
    real = offset[None, :] < rows[:, None]
    to = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return _Bucket(
        query=to(query),
        key=to(key.reshape(-1)),
        mask=to(np.tile(mask, (1, groups, 1))[:, None]),
        kept=to(np.flatnonzero(real)),
        rows=to(query[real]),
    )


class TorchBackend:
    """Plans for one engine's pool. groups: query heads per KV head."""

    def __init__(self, pool: KVPool, groups: int) -> None:
        self._pool, self._groups = pool, groups

    def plan(self, new_slots: np.ndarray, segments: list[Segment]) -> TorchPagedPlan:
        return TorchPagedPlan(self._pool, new_slots, segments, self._groups)


class TorchPagedPlan:
    """Writes the step's new keys and values into the pool, then attends segment by segment over the pool."""

    def __init__(self, pool: KVPool, new_slots: np.ndarray, segments: list[Segment], groups: int) -> None:
        device = pool.kv.device
        self.pool = pool
        self.new_slots = torch.from_numpy(new_slots).to(device)
        decode = [s for s in segments if s.rows == 1]
        prefill = [s for s in segments if s.rows > 1]
        self.buckets = [_bucket(part, groups, device) for part in (decode, prefill) if part]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [1, H, N, D], k and v [1, H_kv, N, D] of the packed row -> [1, N, H, D]."""
        pool = self.pool.kv[layer]
        pool.index_copy_(0, self.new_slots, torch.stack((k[0].transpose(0, 1), v[0].transpose(0, 1)), dim=1))
        flat = pool.flatten(1)
        heads, tokens, dim = q.shape[1:]
        kv_heads = k.shape[1]
        packed = q[0].transpose(0, 1)
        out = q.new_empty((tokens, heads, dim))
        for bucket in self.buckets:
            count, width = bucket.query.shape
            # [S, Q, H_kv, G, D] -> [S, H_kv, G * Q, D]: query heads of one KV head become extra queries.
            grouped = packed[bucket.query].view(count, width, kv_heads, heads // kv_heads, dim)
            grouped = grouped.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, -1, dim)
            seen = flat.index_select(0, bucket.key).view(count, -1, 2, kv_heads, dim)
            seen_k, seen_v = seen[:, :, 0].transpose(1, 2), seen[:, :, 1].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(grouped, seen_k, seen_v, attn_mask=bucket.mask, scale=scaling)
            mixed = mixed.view(count, kv_heads, heads // kv_heads, width, dim).permute(0, 3, 1, 2, 4)
            out[bucket.rows] = mixed.reshape(count * width, heads, dim)[bucket.kept]
        return out[None]

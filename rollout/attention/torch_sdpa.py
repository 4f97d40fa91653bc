"""The portable backend: SDPA over each stream's block of the pool, where it lies.

Invariants:
* no key or value is copied: a stream's block is read as a view;
* a segment's keys may lie in any order; its mask says which of the block it sees, and is built once per forward;
* nothing is padded: a short stream does not pay for a long one beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from rollout.attention.segments import Segment
from rollout.engine.kv_pool import KVPool


class TorchBackend:
    """Attention over one engine's pool, which must keep blocks. groups: query heads per KV head."""

    def __init__(self, pool: KVPool, groups: int) -> None:
        assert not pool.paged, "SDPA reads blocks"
        self._pool, self._groups = pool, groups

    def segments(self, segments: list[Segment]) -> _Ranges:
        ranges = []
        for segment in segments:
            first = int(segment.slots.min())
            stop = int(segment.slots.max()) + 1
            ranges.append(_Range(segment.start, segment.rows, first, stop, self._mask(segment, first, stop)))
        return _Ranges(self._pool, self._groups, ranges)

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> _Ranges:
        # A block's slots follow one another, so its first and the length say it all. No copy on a CPU; elsewhere one a step.
        firsts, counts = table[seats, 0].tolist(), lengths.tolist()
        return _Ranges(
            self._pool,
            self._groups,
            [
                _Range(i, 1, first, first + count, None)
                for i, (first, count) in enumerate(zip(firsts, counts, strict=True))
            ],
        )

    def _mask(self, segment: Segment, first: int, stop: int) -> torch.Tensor | None:
        """Return what to add to the scores, [1, 1, rows, stop - first]; None where every row sees the whole range."""
        if segment.rows == 1 and len(segment.slots) == stop - first:
            return None
        columns = segment.slots - first
        kv = self._pool.kv
        # Numbers and not bool, which SDPA would turn into numbers in every layer.
        number = np.float64 if kv.dtype == torch.float64 else np.float32
        mask = np.zeros((segment.rows, stop - first), number)
        if len(columns) < stop - first:  # what lies between belongs to nobody, or to another lane
            unseen = np.ones(stop - first, bool)
            unseen[columns] = False
            mask[:, unseen] = -np.inf
        mask[:, columns[len(columns) - segment.rows :]] = _later(segment.rows)
        return torch.from_numpy(mask).to(kv.device, kv.dtype)[None, None]


@lru_cache(maxsize=64)
def _later(rows: int) -> np.ndarray:
    """Return [rows, rows] with -inf where a segment's own token comes after the row's."""
    return np.triu(np.full((rows, rows), -np.inf), 1)


@dataclass(frozen=True)
class _Range:
    """Rows [start, start + rows) of the row attend to slots [first, stop)."""

    start: int
    rows: int
    first: int
    stop: int
    mask: torch.Tensor | None


class _Ranges:
    def __init__(self, pool: KVPool, groups: int, ranges: list[_Range]) -> None:
        self._pool, self._groups, self._ranges = pool, groups, ranges

    def __call__(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        heads, tokens, dim = q.shape
        kv = self._pool.kv[layer]
        # [H_kv, G, N, D]: query heads by the KV head that they share.
        grouped = q.unflatten(0, (heads // self._groups, self._groups))
        out = q.new_empty((tokens, heads // self._groups, self._groups, dim)).permute(1, 2, 0, 3)
        for r in self._ranges:
            keys, values = kv[:, :, None, r.first : r.stop].unbind(0)
            rows = grouped[:, :, r.start : r.start + r.rows]
            if r.rows == 1 and r.mask is None:
                # The query heads of one KV head as the queries of one head: their keys are read once.
                mixed = F.scaled_dot_product_attention(rows.transpose(1, 2), keys, values, scale=scaling).transpose(
                    1, 2
                )
            else:
                shared = (-1, self._groups, -1, -1)
                mixed = F.scaled_dot_product_attention(
                    rows, keys.expand(shared), values.expand(shared), attn_mask=r.mask, scale=scaling
                )
            out[:, :, r.start : r.start + r.rows] = mixed
        return out.permute(2, 0, 1, 3).flatten(1, 2)

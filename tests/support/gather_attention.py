"""Attention over a paged pool on any device: each row gathers the slots that it sees. Simple and slow.

The engine uses pages only with FlashInfer, which needs a GPU; with this backend it uses them anywhere.
"""

from __future__ import annotations

import numpy as np
import torch

from rollout.attention import Attend, Segment
from rollout.engine.kv_pool import KVPool


class GatherBackend:
    """groups: query heads per KV head."""

    captures = False

    def __init__(self, pool: KVPool, groups: int) -> None:
        assert pool.paged
        self._pool, self._groups = pool, groups

    def segments(self, segments: list[Segment]) -> Attend:
        rows = [s.slots[: len(s.slots) - s.rows + i + 1] for s in segments for i in range(s.rows)]
        return self._over([torch.from_numpy(np.array(slots)) for slots in rows])

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> Attend:
        return self._over([table[seat, :length] for seat, length in zip(seats, lengths, strict=True)])

    def _over(self, rows: list[torch.Tensor]) -> Attend:
        def attend(layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
            out = []
            for i, slots in enumerate(rows):
                k, v = self._pool.kv[layer, slots].repeat_interleave(self._groups, dim=2).unbind(1)
                weights = torch.softmax(torch.einsum("hd,nhd->hn", q[:, i], k) * scaling, dim=-1)
                out.append(torch.einsum("hn,nhd->hd", weights, v))
            return torch.stack(out)

        return attend


class WholeTableBackend(GatherBackend):
    """Decodes over the whole table, what lies behind a row's keys masked: nothing on the host depends on lengths."""

    captures = True

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> Attend:
        slots = table[seats]
        behind = (torch.arange(slots.shape[1]) >= lengths[:, None])[:, None]

        def attend(layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
            k, v = self._pool.kv[layer][slots].repeat_interleave(self._groups, dim=3).unbind(2)
            scores = torch.einsum("hnd,nwhd->nhw", q, k) * scaling
            weights = torch.softmax(scores.masked_fill(behind, -torch.inf), dim=-1)
            return torch.einsum("nhw,nwhd->nhd", weights, v)

        return attend

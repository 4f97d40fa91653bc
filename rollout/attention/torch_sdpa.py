"""The portable backend: SDPA over the streams' blocks of the pool, where they lie.

Invariants:
* no key or value is copied: a stream's block is read as a view;
* a segment's keys may lie in any order; its mask says which of the block it sees, and is built once per forward;
* a short stream does not pay for a long one beside it: rows that are batched have nearly as many keys each (MOST_PADDING);
* what a batch reads beyond a row's own keys, its neighbours' or what earlier streams left, has weight 0: any finite value there
  is without effect. A key or value that is not finite, which only a broken model makes, would spoil the rows of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rollout.attention.segments import Segment
from rollout.engine.kv_pool import KVPool

MOST_PADDING = 0.1
"""Keys that a batch may read beyond those of its rows, as a share of all that it reads."""


class TorchBackend:
    """Attention over one engine's pool, which must keep blocks. groups: query heads per KV head."""

    captures = False

    def __init__(self, pool: KVPool, groups: int) -> None:
        assert not pool.paged, "SDPA reads blocks"
        self._pool, self._groups = pool, groups
        # Of the steps of one visit: the seats, their blocks' first slots ascending, and which row each is of; None: as it is.
        self._seats: torch.Tensor | None = None
        self._firsts = np.zeros(0, np.int64)
        self._order: torch.Tensor | None = None

    def segments(self, segments: list[Segment]) -> _Ranges:
        ranges = []
        # Streams that began together have their tokens at the same places of their blocks: one mask serves them all.
        masks: dict[tuple[int, int, bool, bytes], torch.Tensor] = {}
        for segment in segments:
            start, rows, slots, known = segment
            # To look for it takes as long as the rest.
            first, stop = known or (int(np.minimum.reduce(slots)), int(np.maximum.reduce(slots)) + 1)
            whole = len(slots) == stop - first
            mask = None
            if rows > 1 or not whole:
                # Where it sees the whole range, its own tokens' places say it all.
                columns = (slots[-rows:] if whole else slots) - first
                key = rows, stop - first, whole, columns.tobytes()
                if key not in masks:
                    masks[key] = self._mask(rows, columns, stop - first, whole=whole)
                mask = masks[key]
            ranges.append(_Range(start, rows, first, stop, mask))
        return _Ranges(self._pool, self._groups, _in_runs(ranges, self._groups))

    def decode(self, table: torch.Tensor, seats: torch.Tensor, lengths: torch.Tensor) -> _Batches:
        if seats is not self._seats:
            # A block's slots follow one another, so its first and the length say it all.
            firsts = table[seats, 0].cpu().numpy()
            order = firsts.argsort(kind="stable")
            self._seats, self._firsts = seats, firsts[order]
            self._order = None if (order[1:] > order[:-1]).all() else torch.from_numpy(order).to(seats.device)
        seen = lengths if self._order is None else lengths[self._order]
        batches = _batched(self._firsts, seen.cpu().numpy(), self._pool.trash + 1)
        return _Batches(
            self._pool,
            self._groups,
            [(batch, self._padding(batch, seen[batch.start : batch.stop])) for batch in batches],
            self._order,
        )

    def _padding(self, batch: _Batch, lengths: torch.Tensor) -> torch.Tensor | None:
        """Return what to add to the scores of a batch, [rows, 1, 1, keys]; None where all rows see as many keys."""
        if not batch.ragged:
            return None
        kv = self._pool.kv
        behind = torch.arange(batch.keys, device=kv.device) >= lengths[:, None]
        return kv.new_zeros(behind.shape).masked_fill_(behind, -torch.inf)[:, None, None]

    def _mask(self, rows: int, columns: np.ndarray, width: int, *, whole: bool) -> torch.Tensor:
        """Return what to add to the scores, [1, 1, rows, width].

        columns: where in the range the segment's slots lie, int64 [n]; the last are those of its own tokens. whole: it sees
        all of the range, and `columns` may be of its own tokens alone.
        """
        kv = self._pool.kv
        # Numbers and not bool, which SDPA would turn into numbers in every layer.
        number = np.float64 if kv.dtype == torch.float64 else np.float32
        mask = np.zeros((rows, width), number)
        if not whole:  # what lies between belongs to nobody, or to another lane
            unseen = np.ones(width, bool)
            unseen[columns] = False
            mask[:, unseen] = -np.inf
        mask[:, columns[len(columns) - rows :]] = _later(rows)
        return torch.from_numpy(mask).to(kv.device, kv.dtype)[None, None]


@lru_cache(maxsize=8)
def _later(rows: int) -> np.ndarray:
    """Return [rows, rows] with -inf where a segment's own token comes after the row's."""
    return np.triu(np.full((rows, rows), -np.inf), 1)


class _Range(NamedTuple):
    """Rows [start, start + rows) of the row attend to slots [first, stop).

    streams: so many ranges in one, which differ in nothing but their place: each has the next `rows` rows, and its slots lie
    `stride` behind those of the one before. Then the mask is [1, 1, rows * groups, keys], that of a row for each of its heads.
    """

    start: int
    rows: int
    first: int
    stop: int
    mask: torch.Tensor | None
    streams: int = 1
    stride: int = 0


def _in_runs(ranges: list[_Range], groups: int) -> list[_Range]:
    """Put neighbours together that are alike, where they are at least `groups`: their mask takes no more than one for each."""
    runs, masks = [], {}
    at = 0
    while at < len(ranges):
        first, stop = ranges[at], at + 1
        stride = ranges[stop].first - first.first if stop < len(ranges) else 0
        # As of blocks, one behind the other.
        while stride > 0 and stop < len(ranges) and _follows(ranges[stop - 1], ranges[stop], stride):
            stop += 1
        count = stop - at
        if count < max(2, groups):
            runs += ranges[at:stop]
        else:
            mask = first.mask
            if mask is not None:
                # Streams that began together and have gaps in their slots may have them in several runs.
                key = id(mask)
                if key not in masks:
                    masks[key] = mask.repeat_interleave(groups, 2)
                mask = masks[key]
            runs.append(first._replace(mask=mask, streams=count, stride=stride))
        at = stop
    return runs


def _follows(last: _Range, this: _Range, stride: int) -> bool:
    # Ranges share a mask if they are alike in all that it says; one that sees all of its range has none.
    return (
        this.first - last.first == stride
        and this.stop - last.stop == stride
        and this.rows == last.rows
        and this.mask is last.mask
    )


class _Ranges:
    def __init__(self, pool: KVPool, groups: int, ranges: list[_Range]) -> None:
        self._pool, self._groups, self._ranges = pool, groups, ranges

    def __call__(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        heads, tokens, dim = q.shape
        kv = self._pool.kv[layer]
        # [N, H_kv, G, D]: query heads by the KV head that they share.
        grouped = q.transpose(0, 1).unflatten(1, (heads // self._groups, self._groups))
        out = q.new_empty((tokens, heads // self._groups, self._groups, dim))
        for r in self._ranges:
            rows = slice(r.start, r.start + r.streams * r.rows)
            attend = self._one if r.streams == 1 else self._run
            attend(kv, r, grouped[rows], out[rows], scaling)
        return out.flatten(1, 2)

    def _one(self, kv: torch.Tensor, r: _Range, q: torch.Tensor, out: torch.Tensor, scaling: float) -> None:
        """q, out: [rows, H_kv, G, D]."""
        keys, values = kv[:, :, None, r.first : r.stop].expand(-1, -1, self._groups, -1, -1).unbind(0)
        mixed = F.scaled_dot_product_attention(q.permute(1, 2, 0, 3), keys, values, attn_mask=r.mask, scale=scaling)
        out.copy_(mixed.permute(2, 0, 1, 3))

    def _run(self, kv: torch.Tensor, r: _Range, q: torch.Tensor, out: torch.Tensor, scaling: float) -> None:
        """The query heads of a KV head as rows of one head: their keys are read once. q, out: [streams * rows, H_kv, G, D]."""
        seen = _where_they_lie(kv, r.first, r.stride, r.streams, r.stop - r.first)
        # [streams, H_kv, rows * G, D], all of a row's heads together.
        rows = q.unflatten(0, (r.streams, r.rows)).transpose(1, 2).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(rows, seen[0], seen[1], attn_mask=r.mask, scale=scaling)
        out.unflatten(0, (r.streams, r.rows)).copy_(mixed.unflatten(2, (r.rows, self._groups)).transpose(1, 2))


def _where_they_lie(kv: torch.Tensor, first: int, stride: int, streams: int, keys: int) -> torch.Tensor:
    """Return [2, streams, H_kv, keys, D], a view: the keys and values of streams whose slots lie `stride` apart.

    kv: of one layer, [2, H_kv, slots, D].
    """
    dim = kv.shape[-1]
    return kv[:, None, :, first:].as_strided(
        (2, streams, kv.shape[1], keys, dim), (kv.stride(0), stride * dim, kv.stride(1), dim, 1)
    )


@dataclass(frozen=True)
class _Batch:
    """Rows [start, stop), each of which attends to slots of its own: row `start + i` to those from `first + i * stride` on.

    Attributes:
        keys: slots that each row reads. ragged: some see fewer.
    """

    start: int
    stop: int
    first: int
    stride: int
    keys: int
    ragged: bool


def _batched(firsts: np.ndarray, counts: np.ndarray, slots: int) -> list[_Batch]:
    """Put neighbouring rows together whose blocks lie at equal distances and which have nearly as many keys.

    Args:
        firsts: the first slot of each row, int64 [n] ascending; counts: how many it sees, int64 [n].
        slots: of the pool; no row reads beyond.
    """
    rows = len(firsts)
    if rows > 1:
        # Mostly all are alike: streams that began together have blocks of one size.
        strides, most = np.diff(firsts), int(counts.max())
        padding = rows * most - int(counts.sum())
        if (strides == strides[0]).all() and padding <= MOST_PADDING * rows * most and firsts[-1] + most <= slots:
            return [_Batch(0, rows, int(firsts[0]), int(strides[0]), most, padding > 0)]
    return _neighbours(firsts.tolist(), counts.tolist(), slots)


def _neighbours(firsts: list[int], counts: list[int], slots: int) -> list[_Batch]:
    """Batch row by row: each joins the one before if it fits there."""
    batches = []
    start, total = 0, 0
    stride, longest, shortest = 0, 0, 0
    for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        if row > start:
            apart = first - firsts[row - 1]
            most = max(longest, count)
            read = (row + 1 - start) * most
            if (
                (row == start + 1 or apart == stride)
                and read - total - count <= MOST_PADDING * read
                and first + most <= slots
            ):
                stride, longest, shortest, total = apart, most, min(shortest, count), total + count
                continue
            batches.append(_Batch(start, row, firsts[start], stride, longest, shortest < longest))
        start, total = row, count
        stride, longest, shortest = 0, count, count
    batches.append(_Batch(start, len(firsts), firsts[start], stride, longest, shortest < longest))
    return batches


class _Batches:
    """One row per stream. order: what row comes where in the batches, int64 [n]; None: as they are."""

    def __init__(
        self,
        pool: KVPool,
        groups: int,
        batches: list[tuple[_Batch, torch.Tensor | None]],
        order: torch.Tensor | None,
    ) -> None:
        self._pool, self._groups, self._batches, self._order = pool, groups, batches, order

    def __call__(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        heads = len(q)
        kv = self._pool.kv[layer]
        if self._order is not None:
            q = q[:, self._order]
        # [N, H_kv, G, D]: the query heads of one KV head as the queries of one head, so that their keys are read once.
        grouped = q.transpose(0, 1).unflatten(1, (heads // self._groups, self._groups))
        outs = []
        for batch, mask in self._batches:
            seen = _where_they_lie(kv, batch.first, batch.stride, batch.stop - batch.start, batch.keys)
            rows = grouped[batch.start : batch.stop]
            outs.append(F.scaled_dot_product_attention(rows, seen[0], seen[1], attn_mask=mask, scale=scaling))
        mixed = (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1, 2)
        if self._order is None:
            return mixed
        return torch.empty_like(mixed).index_copy_(0, self._order, mixed)

"""The torch backend's attention against one softmax, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.attention import Segment, make_backend
from rollout.engine.kv_pool import KVPool

HEADS, KV_HEADS, DIM, SLOTS = 6, 2, 8, 90
SCALE = DIM**-0.5


@pytest.fixture
def pool():
    made = KVPool(SLOTS, layers=2, kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float64)
    made.kv.copy_(torch.randn(made.kv.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return made


def queries(count: int) -> torch.Tensor:
    return torch.randn(HEADS, count, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(pool, layer, q, slots) -> torch.Tensor:
    """One query [H, D] over its slots -> [H, D]."""
    k, v = (pool.kv[layer, i][:, torch.from_numpy(np.asarray(slots))] for i in range(2))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 0) for t in (k, v))
    return torch.softmax((q[:, None] @ k.mT) * SCALE, -1).matmul(v)[:, 0]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_segment_sees_its_slots_in_any_order_and_its_own_tokens_causally(pool, layer):
    rng = np.random.default_rng(2)
    segments, at = [], 0
    for first, span, seen, rows in ((0, 30, 30, 7), (30, 25, 14, 4), (55, 9, 9, 9), (70, 20, 12, 1), (66, 1, 1, 1)):
        slots = first + rng.permutation(span)[:seen]
        segments.append(Segment(at, rows, slots))
        at += rows
    q = queries(at)
    out = make_backend("torch", pool, HEADS // KV_HEADS).segments(segments)(layer, q, SCALE)
    assert out.shape == (at, HEADS, DIM)
    for segment in segments:
        for i in range(segment.rows):
            row, stop = segment.start + i, len(segment.slots) - segment.rows + i + 1
            torch.testing.assert_close(out[row], plain(pool, layer, q[:, row], segment.slots[:stop]))


def test_a_seat_sees_the_first_slots_of_its_block(pool):
    table = torch.full((4, 20), SLOTS)
    for seat, first in ((0, 40), (2, 3), (3, 70)):
        table[seat] = torch.arange(first, first + 20)
    seats, lengths = torch.tensor([2, 0, 3]), torch.tensor([1, 20, 13])
    q = queries(3)
    out = make_backend("torch", pool, HEADS // KV_HEADS).decode(table, seats, lengths)(1, q, SCALE)
    for i in range(3):
        seen = table[seats[i], : lengths[i]].numpy()
        torch.testing.assert_close(out[i], plain(pool, 1, q[:, i], seen))

"""The torch backend's attention against one softmax, row by row."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.attention import Segment, make_backend
from rollout.attention.torch_sdpa import MOST_PADDING, _batched
from rollout.engine.kv_pool import KVPool

HEADS, KV_HEADS, DIM, SLOTS = 6, 2, 8, 90
SCALE = DIM**-0.5
SDPA = torch.nn.functional.scaled_dot_product_attention


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


def attended(pool, segments: list[Segment]) -> int:
    """Check every row of these segments against one softmax; return how many calls of SDPA a layer took."""
    q = queries(sum(segment.rows for segment in segments))
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", wraps=SDPA) as sdpa:
        out = make_backend("torch", pool, HEADS // KV_HEADS).segments(segments)(1, q, SCALE)
    for segment in segments:
        for i in range(segment.rows):
            row, stop = segment.start + i, len(segment.slots) - segment.rows + i + 1
            torch.testing.assert_close(out[row], plain(pool, 1, q[:, row], segment.slots[:stop]))
    return sdpa.call_count


# A KV head has 3 query heads: fewer streams than that would have a larger mask in one call than in calls of their own.
@pytest.mark.parametrize(("streams", "calls"), [(1, 1), (2, 2), (3, 1), (4, 1)])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("gaps", [False, True])
def test_streams_that_differ_in_their_place_alone_share_a_call(pool, streams, calls, rows, gaps):
    seen = np.arange(20)
    if gaps:
        seen = np.delete(seen, [3, 4, 11])
    segments = [Segment(rows * i, rows, 22 * i + seen) for i in range(streams)]
    assert attended(pool, segments) == calls


def test_runs_of_streams_end_where_one_differs(pool):
    alike = [Segment(2 * i, 2, 10 * i + np.arange(9)) for i in range(3)]
    for rows, slots, calls in (
        (2, np.arange(30, 39), 1),
        (2, np.arange(31, 40), 2),
        (2, np.arange(30, 38), 2),
        (3, np.arange(30, 39), 2),
        (2, np.delete(np.arange(30, 39), 4), 2),
    ):
        assert attended(pool, [*alike, Segment(6, rows, slots)]) == calls
    # Blocks that descend lie at no distance that a view can have.
    assert attended(pool, [Segment(2 * i, 2, 20 - 10 * i + np.arange(9)) for i in range(3)]) == 3


@given(st.data())
def test_segments_in_any_places_see_their_own_keys_only(data):
    pool = KVPool(SLOTS, layers=2, kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float64)
    pool.kv.copy_(torch.randn(pool.kv.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    segments, at = [], 0
    # Few values, so that neighbours are often alike; ranges may overlap, as nothing is written.
    for _ in range(data.draw(st.integers(1, 9))):
        keys = data.draw(st.sampled_from([4, 5]))
        slots = 10 * data.draw(st.integers(0, 8)) + np.arange(keys)
        rows = data.draw(st.sampled_from([1, 3]))
        if data.draw(st.booleans()):
            slots = np.delete(slots, 0 if rows == 3 else 1)
        segments.append(Segment(at, rows, slots))
        at += rows
    attended(pool, segments)


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


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_at_equal_distances_share_a_call_and_see_their_own_keys_only(pool, monkeypatch, reverse):
    """Lengths that differ little are batched under a mask; what lies behind a stream's keys counts for nothing."""
    calls = 0

    def counted(*args, **named):
        nonlocal calls
        calls += 1
        return sdpa(*args, **named)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    lengths = [20, 19, 20, 18]
    table = torch.arange(80).view(4, 20)
    seats = torch.tensor([3, 2, 1, 0] if reverse else [0, 1, 2, 3])
    q = queries(4)
    out = make_backend("torch", pool, HEADS // KV_HEADS).decode(table, seats, torch.tensor(lengths)[seats])(1, q, SCALE)
    assert calls == 1
    for i, seat in enumerate(seats.tolist()):
        torch.testing.assert_close(out[i], plain(pool, 1, q[:, i], table[seat, : lengths[seat]].numpy()))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=12))
def test_batches_hold_every_row_and_read_little_more_than_it_sees(blocks):
    firsts, counts, at = [], [], 0
    for width, count in blocks:
        firsts.append(at)
        counts.append(count)
        at += 10 * width + 40
    batches = _batched(np.array(firsts), np.array(counts), at)
    assert [row for batch in batches for row in range(batch.start, batch.stop)] == list(range(len(blocks)))
    for batch in batches:
        rows = range(batch.start, batch.stop)
        assert [batch.first + (row - batch.start) * batch.stride for row in rows] == firsts[batch.start : batch.stop]
        assert batch.keys == max(counts[row] for row in rows)
        assert batch.ragged == (len({counts[row] for row in rows}) > 1)
        read = batch.keys * len(rows)
        assert read - sum(counts[row] for row in rows) <= MOST_PADDING * read
        assert firsts[batch.stop - 1] + batch.keys <= at

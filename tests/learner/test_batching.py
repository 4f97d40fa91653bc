"""Sharing a step out over ranks: a partition, balanced, the same every time, and the same forwards everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import MicroBatchWork, common_work
from learner.losses.base import TargetCounts
from learner.losses.sft import SftWeights
from learner.parallel.assign import share_out
from streams.log.record import Kind

pytestmark = pytest.mark.smoke

TOKENS = st.lists(st.integers(0, 10_000), max_size=24)
WORK = st.lists(st.builds(MicroBatchWork, st.sampled_from(["", "pre_merger"]), st.integers(1, 9)), max_size=5).map(
    tuple
)


@given(TOKENS, st.integers(1, 9))
def test_every_group_goes_to_exactly_one_rank_in_the_batchs_order(tokens, ranks):
    shares = share_out(tokens, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(tokens)))
    assert all(share == sorted(share) for share in shares)
    assert shares == share_out(list(tokens), ranks)


@given(TOKENS.filter(bool), st.integers(1, 9))
def test_no_rank_has_more_than_the_mean_and_the_longest_group_beyond_it(tokens, ranks):
    loads = [sum(tokens[i] for i in share) for share in share_out(tokens, ranks)]
    assert max(loads) <= sum(tokens) / ranks + max(tokens)
    # The greedy bound of longest-first scheduling, which any worse order of assignment would break somewhere.
    assert max(loads) - min(loads) <= max(tokens)


@given(st.integers(1, 24), st.integers(1, 9))
def test_groups_of_unknown_length_are_dealt_out_evenly(count, ranks):
    sizes = [len(share) for share in share_out([0] * count, ranks)]
    assert max(sizes) - min(sizes) <= 1


def test_longest_groups_are_placed_first():
    assert share_out([5, 9, 4, 3, 3], 2) == [[1, 3], [0, 2, 4]]
    assert share_out([7], 3) == [[0], [], []]
    assert share_out([], 2) == [[], []]


@given(st.lists(WORK, min_size=1, max_size=5))
def test_common_work_covers_every_ranks_work_and_no_more(ranks):
    common = common_work(ranks)
    assert len(common) == max(len(works) for works in ranks)
    for i, work in enumerate(common):
        here = [works[i] for works in ranks if i < len(works)]
        assert work.head_chunks == max(w.head_chunks for w in here)
        assert work.vision == max(w.vision for w in here)


KINDS = (Kind.THINK, Kind.DECISION, Kind.RESPONSE, Kind.END)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 2, 3])), max_size=30), st.floats(0.1, 5))
def test_the_normaliser_is_the_sum_of_all_targets_weights(tokens, answer):
    kind = np.array([int(k) for k, _ in tokens], dtype=np.int8)
    ids = np.array([i for _, i in tokens], dtype=np.int64)
    decision = kind == Kind.DECISION
    counts = TargetCounts(
        len(tokens),
        int((decision & (ids == 1)).sum()),
        int((decision & (ids == 2)).sum()),
        int((kind == Kind.RESPONSE).sum()),
    )
    weights = SftWeights(1, 2, 0.7, 3.0, answer)
    assert weights.total(counts) == pytest.approx(weights.of(ids, kind).sum())
    half = len(tokens) // 2
    assert weights.total(counts + TargetCounts()) == weights.total(counts)
    assert len(weights.of(ids[:half], kind[:half])) == half

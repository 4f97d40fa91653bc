"""Scoring: packing, the two masks, the chunked head. The learner's block mask is the engine's own record."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.backbone.backbone import VideoTokens
from streams.log.mismatch import LogpDiff
from streams.log.record import NEVER
from streams.memory import MemoryConfig
from streams.scoring.logprobs import attention_plan, score_rows
from streams.scoring.mask import DensePlan, FlexPlan, block_mask, dense_mask
from streams.scoring.packing import pack, plan_micro_batches, plan_rows
from tests.support.streams import (
    MODEL_TYPES,
    joined_features,
    loud_backbone,
    norms_in_input_dtype,
    random_turns,
    request,
    run,
)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def fp64(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("scoring"), torch.float64, request.param)


@pytest.fixture(scope="module")
def logged(fp64):
    rng = np.random.default_rng(0)
    memory = [MemoryConfig("full"), MemoryConfig("rcsm", 2), MemoryConfig("recent_frames", 2)]
    requests = [request(fp64, memory[i % 3], random_turns(fp64, rng, 4 + i), f"s{i}") for i in range(6)]
    return requests, run(fp64, requests)


def brute_force(expiry, lane):
    length = len(expiry)
    return np.array(
        [[k <= q < expiry[k] and lane[k] <= lane[q] for k in range(length)] for q in range(length)], bool
    ).reshape(length, length)


EXPIRY = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1)), min_size=1, max_size=40)


@given(EXPIRY)
@settings(max_examples=100, deadline=None)
def test_dense_mask_is_the_predicate(tokens):
    expiry = np.array([i + 1 + e for i, (e, _) in enumerate(tokens)])
    lane = np.array([lane for _, lane in tokens])
    dense = dense_mask(torch.from_numpy(expiry)[None], torch.from_numpy(lane)[None])[0, 0].numpy()
    assert (dense == brute_force(expiry, lane)).all()


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_scores_and_gradients_do_not_depend_on_the_head_chunk(fp64, logged, chunk):
    requests, logs = logged
    rows = pack(logs, [[0, 1], [2]])
    features = torch.cat([joined_features(r) for r in requests[:3]])
    weight = fp64.model.lm_head.weight

    def scored(head_chunk):
        fp64.model.zero_grad()
        scores = score_rows(fp64, rows, features, head_chunk=head_chunk)
        scores.logp.sum().backward()
        return scores.logp.detach(), weight.grad.clone()

    logp, grad = scored(chunk)
    whole_logp, whole_grad = scored(10_000)
    torch.testing.assert_close(logp, whole_logp, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, whole_grad, atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_the_entropys_gradient_is_that_of_its_definition_at_any_head_chunk(fp64, logged, chunk):
    """By the closed form: the gradient of H by the logits is -p (log p + H)."""
    requests, logs = logged
    rows = pack(logs[:2], [[0, 1]])
    features = torch.cat([joined_features(r) for r in requests[:2]])
    head = fp64.model.lm_head
    with torch.no_grad():
        plan = attention_plan(rows, "sdpa", fp64)
        hidden = fp64.hidden(rows.ids, rows.positions, plan, VideoTokens(rows.video_index, features))
    states = hidden.flatten(0, 1)[rows.predictor]
    logp = fp64.logits(states, 0.7).log_softmax(-1)
    p, entropy = logp.exp(), score_rows(fp64, rows, features, temperature=0.7).entropy
    assert not entropy.requires_grad
    by_logit = torch.where(p > 0, -p * (logp + entropy.detach()[:, None]), p) / 0.7
    expected = by_logit.T @ states
    for parameter in fp64.model.parameters():
        parameter.grad = None
    scores = score_rows(fp64, rows, features, temperature=0.7, head_chunk=chunk, entropy_gradient=True)
    torch.testing.assert_close(scores.entropy.detach(), entropy, atol=1e-12, rtol=0)
    scores.entropy.sum().backward()
    assert (head.weight.grad - expected).abs().max() < 1e-12
    for parameter in fp64.model.parameters():
        parameter.grad = None


def test_flex_attention_on_the_learners_block_mask_equals_the_dense_mask(fp64, logged):
    """FlexAttention's eager forward (no backward exists on CPU) on the very mask that the learner would use on CUDA."""
    requests, logs = logged
    rows = pack(logs, [[0, 1, 2, 3], [4, 5]])
    features = torch.cat([joined_features(r) for r in requests])
    with torch.no_grad():
        dense = score_rows(fp64, rows, features, attention="sdpa")
        flex = score_rows(fp64, rows, features, attention="flex")
    torch.testing.assert_close(flex.logp, dense.logp, atol=1e-10, rtol=0)
    # And the comparison can fail: the same block mask without eviction is far away.
    wrong = torch.where(rows.expiry < rows.expiry.shape[1], rows.expiry, rows.expiry)
    q = torch.randn(2, 4, rows.ids.shape[1], 16, dtype=torch.float64)
    k = torch.randn(2, 2, rows.ids.shape[1], 16, dtype=torch.float64)
    right = DensePlan(dense_mask(rows.expiry, rows.lane)).attend(0, q, k, k, 0.25)
    torch.testing.assert_close(FlexPlan(block_mask(wrong, rows.lane)).attend(0, q, k, k, 0.25), right)
    never = torch.full_like(rows.expiry, rows.expiry.shape[1])
    assert (FlexPlan(block_mask(never, rows.lane)).attend(0, q, k, k, 0.25) - right).abs().max() > 1e-3


@pytest.mark.parametrize("at_least", [1, 1000])
def test_more_padding_changes_no_score(fp64, logged, at_least):
    requests, logs = logged
    rows = pack(logs, [[0, 1, 2, 3], [4, 5]])
    features = torch.cat([joined_features(r) for r in requests])
    wide = rows.padded(128, at_least=at_least)
    assert wide.ids.shape[1] % 128 == 0
    assert wide.ids.shape[1] >= max(at_least, rows.ids.shape[1])
    assert wide.padded(128, at_least=at_least) is wide
    with torch.no_grad():
        plain, padded = score_rows(fp64, rows, features), score_rows(fp64, wide, features)
    torch.testing.assert_close(padded.logp, plain.logp, atol=1e-10, rtol=0)


def test_expiry_is_capped_at_each_streams_end(logged):
    _, logs = logged
    rows = pack(logs, [[0, 1, 2]])
    ends = np.cumsum([len(log) for log in logs[:3]])
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert int(rows.expiry[0, start:end].max()) == end
    assert any((log.expiry == NEVER).any() for log in logs)


def test_features_that_do_not_match_the_log_are_refused(fp64, logged):
    requests, logs = logged
    rows = pack(logs[:1], [[0]])
    with pytest.raises(ValueError, match="media and log do not match"):
        score_rows(fp64, rows, joined_features(requests[0])[:-1])
    with pytest.raises(ValueError, match="media and log do not match"):
        score_rows(fp64, rows, None)
    with pytest.raises(ValueError, match=r"features of width \d+, but qwen"):
        score_rows(fp64, rows, joined_features(requests[0])[:, :-1])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(10, 120), st.integers(50, 400))
@settings(max_examples=200, deadline=None)
def test_every_stream_is_packed_once_and_limits_hold(lengths, capacity, max_tokens):
    rows = plan_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)
    batches = plan_micro_batches(lengths, capacity, max_tokens)
    assert sorted(i for batch in batches for row in batch for i in row) == list(range(len(lengths)))
    for batch in batches:
        width = max(sum(lengths[i] for i in row) for row in batch)
        assert len(batch) == 1 or len(batch) * width <= max_tokens


def test_an_empty_sample_is_none_and_merging_weighs_by_tokens():
    assert LogpDiff.of(np.zeros(0)) == LogpDiff(0, None, None)
    assert LogpDiff.merge([LogpDiff(), LogpDiff()]) == LogpDiff(0, None, None)
    merged = LogpDiff.merge([LogpDiff(1, 1.0, 1.0, 0.5), LogpDiff(), LogpDiff(3, 3.0, 5.0, 1.5)])
    assert merged == LogpDiff(4, 2.5, 5.0, 1.25)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_outlives_merging_in_any_order(bad):
    good, broken = LogpDiff(2, 1e-6, 1e-5, 0.0), LogpDiff.of(np.array([0.0, bad]))
    for parts in ([good, broken], [broken, good], [good, broken, good]):
        merged = LogpDiff.merge(parts)
        # As a limit is asked for: no comparison with NaN holds.
        assert not merged.max <= 1e-3
        assert not merged.mean <= 1e-3
        assert not merged.k3 <= 1e-3


def test_k3_estimates_the_divergence_of_the_two_distributions():
    rng = np.random.default_rng(0)
    engine, learner = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))
    drawn = rng.choice(8, 200_000, p=engine)
    found = LogpDiff.of(np.log(learner[drawn]) - np.log(engine[drawn]))
    assert found.k3 == pytest.approx((engine * np.log(engine / learner)).sum(), rel=0.03)
    assert LogpDiff.of(np.array([0.5, -0.5])).mean == 0.5


@pytest.mark.parametrize("far", [25.0, 90.0, 300.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_difference_is_reported_as_it_is_and_its_k3_stays_finite(far, dtype):
    found = LogpDiff.of(np.array([0.0, far], dtype=dtype))
    assert found.max == far
    assert found.mean == far / 2
    assert found.k3 == pytest.approx((math.exp(far) - 1 - far) / 2, rel=1e-6)
    assert LogpDiff.of(np.array([-far], dtype=dtype)).k3 == pytest.approx(far - 1)

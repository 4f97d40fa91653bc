"""Losses: hand-computed values, where the gradient is zero, and what does not depend on the cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.losses.kl import k3_kl
from learner.losses.sft import decision_weights, sft_loss
from tests.support.policy_losses import grpo_loss

pytestmark = pytest.mark.smoke


def grpo(logp, behaviour, advantage, *, normaliser=None, low=0.2, high=0.3):
    """(loss, gradient by logp, sums) of float64 inputs."""
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    loss, sums = grpo_loss(
        logp,
        torch.tensor(behaviour, dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64),
        normaliser=len(logp) if normaliser is None else normaliser,
        clip_low=low,
        clip_high=high,
    )
    loss.backward()
    return loss.item(), logp.grad.numpy(), {name: value.item() for name, value in sums.items()}


# --- grpo -------------------------------------------------------------------------------------------------------------


def test_at_ratio_one_the_loss_is_minus_the_mean_advantage_and_so_is_its_gradient_per_token():
    advantage = [1.5, -0.5, 0.25, 0.0]
    loss, gradient, sums = grpo([-1.0, -2.0, -0.1, -3.0], [-1.0, -2.0, -0.1, -3.0], advantage)
    assert loss == pytest.approx(-1.25 / 4)
    assert gradient == pytest.approx([-a / 4 for a in advantage])
    assert sums == pytest.approx({"clip_share": 0, "ratio": 4, "behaviour_kl": 0, "ratio_square": 4})


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        # A good token: only the upper bound holds it back.
        (1.2, 2.0, 2.4, False),
        (1.5, 2.0, 2.6, True),
        (0.5, 2.0, 1.0, False),
        # A bad token: only the lower bound does.
        (0.9, -2.0, -1.8, False),
        (0.5, -2.0, -1.6, True),
        (1.5, -2.0, -3.0, False),
        # Nothing to gain on either side.
        (1.5, 0.0, 0.0, False),
        (0.5, 0.0, 0.0, False),
    ],
)
def test_the_clip_acts_on_one_side_only_and_stops_the_gradient_there(ratio, advantage, objective, clipped):
    loss, gradient, sums = grpo([math.log(ratio)], [0.0], [advantage])
    assert loss == pytest.approx(-objective)
    assert gradient[0] == pytest.approx(0.0 if clipped else -ratio * advantage)
    assert sums["clip_share"] == float(clipped)
    assert sums["ratio"] == pytest.approx(ratio)
    assert sums["ratio_square"] == pytest.approx(ratio**2)
    assert sums["behaviour_kl"] == pytest.approx(ratio - 1 - math.log(ratio))


FLOATS = st.floats(-3, 3)
TOKENS = st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=24)


@given(TOKENS, st.floats(0.05, 0.9), st.floats(0.05, 2.0))
@settings(max_examples=200, deadline=None)
def test_the_gradient_is_that_of_the_unclipped_ratio_or_zero(tokens, low, high):
    logp, behaviour, advantage = (np.array(column) for column in zip(*tokens, strict=True))
    _, gradient, sums = grpo(logp, behaviour, advantage, normaliser=7.0, low=low, high=high)
    ratio = np.exp(logp - behaviour)
    inactive = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    # At the very edge either is a subgradient.
    edge = np.isclose(ratio, 1 + high) | np.isclose(ratio, 1 - low)
    expected = np.where(inactive, 0.0, -ratio * advantage / 7.0)
    assert gradient[~edge] == pytest.approx(expected[~edge])
    # Advantages near the smallest number drown in the rounding of the comparison.
    if not edge.any() and not (np.abs(advantage) < 1e-290).any():
        assert sums["clip_share"] == inactive.sum()
    assert sums["behaviour_kl"] >= -1e-9


@given(TOKENS, st.lists(st.integers(0, 24), max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_step_does_not_depend_on_how_it_was_cut_into_micro_batches(tokens, cuts):
    logp, behaviour, advantage = (np.array(column) for column in zip(*tokens, strict=True))
    weight = np.abs(advantage) + 0.1
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    whole, gradient, sums = grpo(logp, behaviour, advantage, normaliser=11.0)
    parts = [grpo(logp[a:b], behaviour[a:b], advantage[a:b], normaliser=11.0) for a, b in itertools.pairwise(edges)]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(whole)
    assert np.concatenate([g for _, g, _ in parts]) == pytest.approx(gradient)
    for name, total in sums.items():
        assert sum(part[name] for _, _, part in parts) == pytest.approx(total)
    cut = [
        sft_loss(torch.tensor(logp[a:b]), torch.tensor(weight[a:b]), normaliser=11.0)[0].item()
        for a, b in itertools.pairwise(edges)
    ]
    together = sft_loss(torch.tensor(logp), torch.tensor(weight), normaliser=11.0)[0].item()
    assert sum(cut) == pytest.approx(together)


# --- the KL to the reference ------------------------------------------------------------------------------------------


def test_the_kl_term_by_hand_and_its_gradient():
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -2.0, 0.0], dtype=torch.float64)
    kl = k3_kl(logp, reference)
    kl.sum().backward()
    expected = [math.exp(d) - d - 1 for d in (-0.5, 0.0, 0.5)]
    assert kl.tolist() == pytest.approx(expected)
    assert logp.grad.tolist() == pytest.approx([1 - math.exp(d) for d in (-0.5, 0.0, 0.5)])


@given(TOKENS, st.floats(0.0, 2.0))
@settings(max_examples=100, deadline=None)
def test_the_kl_adds_its_weighted_mean_to_the_loss_and_nothing_to_the_other_sums(tokens, kl_coef):
    logp, reference, advantage = (torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True))
    given_ = {"normaliser": 5.0, "clip_low": 0.2, "clip_high": 0.2}
    plain, sums = grpo_loss(logp, logp.clone(), advantage, **given_)
    loss, with_kl = grpo_loss(logp, logp.clone(), advantage, **given_, reference=reference, kl_coef=kl_coef)
    kl = k3_kl(logp, reference)
    assert (kl >= -1e-12).all()
    assert loss.item() == pytest.approx(plain.item() + kl_coef * kl.sum().item() / 5.0)
    assert with_kl.pop("kl").item() == pytest.approx(kl.sum().item())
    assert {k: v.item() for k, v in with_kl.items()} == {k: v.item() for k, v in sums.items()}
    assert "kl" not in sums


def test_a_policy_that_left_the_reference_is_pulled_back():
    logp = torch.tensor([-0.1, -4.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    loss, _ = grpo_loss(
        logp, logp.detach(), zero, normaliser=2.0, clip_low=0.2, clip_high=0.2, reference=reference, kl_coef=0.1
    )
    loss.backward()
    assert logp.grad[0] > 0 > logp.grad[1], (
        "descent lowers what is likelier than under the reference, and lifts the rest"
    )


# --- the cold start ---------------------------------------------------------------------------------------------------


def test_the_cold_starts_loss_is_the_weighted_cross_entropy():
    logp = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    loss, sums = sft_loss(logp, weight, normaliser=4.5)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 1 + 12) / 4.5)
    assert logp.grad.numpy() == pytest.approx([-1 / 4.5, -0.5 / 4.5, -3 / 4.5])
    assert sums["nll"].item() == pytest.approx(7.0), "unweighted"
    assert not sums["nll"].requires_grad


@pytest.mark.parametrize(
    ("silent", "spoken", "clamp", "expected"),
    [
        (5, 5, 20.0, (1.0, 1.0)),
        (9, 1, 20.0, (10 / 18, 5.0)),
        (1, 9, 20.0, (5.0, 10 / 18)),
        (9, 1, 3.0, (10 / 18, 3.0)),
        (9, 1, 0.5, (0.5, 0.5)),
        (4, 0, 20.0, (0.5, 1.0)),
        (0, 4, 20.0, (1.0, 0.5)),
        (0, 0, 20.0, (1.0, 1.0)),
    ],
)
def test_decision_weights_are_half_the_decisions_over_those_of_the_kind(silent, spoken, clamp, expected):
    assert decision_weights(silent, spoken, clamp) == pytest.approx(expected)


@given(st.integers(1, 500), st.integers(1, 500))
def test_unclamped_decision_weights_give_both_decisions_the_same_mass_and_keep_the_total(silent, spoken):
    of_silent, of_spoken = decision_weights(silent, spoken, math.inf)
    assert silent * of_silent == pytest.approx(spoken * of_spoken)
    assert silent * of_silent + spoken * of_spoken == pytest.approx(silent + spoken)


# --- log-ratios that overflow -----------------------------------------------------------------------------------------

FAR = (21.0, 60.0, 88.0, 89.0, 120.0, 800.0, 1e30)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def unbounded(logp, behaviour, advantage, reference=None):
    """The loss as the papers write it, without a bound."""
    log_ratio = logp - behaviour
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    if reference is not None:
        difference = reference - logp
        loss = loss + 0.1 * (difference.exp() - difference - 1.0).sum()
    return loss / 3.0


def bounded(logp, behaviour, advantage, reference=None):
    settings_ = {"normaliser": 3.0, "clip_low": 0.2, "clip_high": 0.2}
    return grpo_loss(logp, behaviour, advantage, **settings_, reference=reference, kl_coef=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("far", FAR)
def test_a_log_ratio_of_any_size_has_a_finite_loss_and_gradient(far, advantage, dtype):
    logp = torch.tensor([0.0, -1.0], dtype=dtype, requires_grad=True)
    behaviour = torch.tensor([-far, -1.0], dtype=dtype)
    loss, sums = bounded(logp, behaviour, torch.full((2,), advantage, dtype=dtype))
    loss.backward()
    assert loss.isfinite()
    assert all(value.isfinite() for value in sums.values())
    assert logp.grad.isfinite().all()
    assert logp.grad[0] == 0, "beyond the bound the objective is flat"
    # The other token trains as if the far one were not there.
    assert logp.grad[1].item() == pytest.approx(-advantage / 3.0, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", FAR)
def test_the_kl_of_any_distance_to_the_reference_is_finite(far, dtype):
    logp = torch.tensor([-far, -1.0, 0.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([0.0, -1.0, -far], dtype=dtype)
    kl = k3_kl(logp, reference)
    kl.sum().backward()
    assert kl.isfinite().all()
    assert (kl >= 0).all()
    assert logp.grad.isfinite().all()
    # Far above the reference the penalty grows with the distance, and pulls back.
    assert kl[2].item() == pytest.approx(far - 1, rel=1e-2)
    assert logp.grad[2] > 0.99


@given(st.lists(st.tuples(st.floats(-200, 20), st.floats(-5, 5), st.floats(-200, 20)), min_size=1, max_size=16))
@settings(max_examples=200, deadline=None)
def test_up_to_the_bound_values_and_gradients_are_bit_for_bit_those_without_one(rows):
    for dtype in DTYPES:
        away, advantage, apart = (torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True))
        found = []
        for loss_of in (bounded, unbounded):
            logp = torch.zeros_like(away, requires_grad=True)
            loss = loss_of(logp, -away, advantage, apart)
            loss = loss[0] if isinstance(loss, tuple) else loss
            loss.backward()
            found.append((loss.detach(), logp.grad))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])

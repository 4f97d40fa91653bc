"""The family of policy losses: each by plain arithmetic, value and gradient, and what they all have in common."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.losses.base import TargetCounts
from learner.losses.config import PolicyGradientConfig
from learner.losses.policy_gradient import entropy_bonus, normaliser_of, policy_loss
from learner.losses.units import BatchUnits, Units
from tests.support.policy_losses import former_loss, grpo_loss

pytestmark = pytest.mark.smoke

PLAIN = PolicyGradientConfig(0.2, 0.3)
CISPO = replace(PLAIN, policy_loss="cispo", clip_low=1.0, clip_high=4.0)
DPPO = replace(PLAIN, policy_loss="dppo", clip_low=0.2, clip_high=0.2)
CURRENT = replace(PLAIN, old_policy="current")
FAMILY = {
    "ppo": PLAIN,
    "dual": replace(PLAIN, dual_clip=3.0),
    "gspo": replace(PLAIN, ratio="stream", aggregate="stream_mean"),
    "gspo by turn": replace(PLAIN, ratio="turn", aggregate="turn_mean"),
    "cispo": CISPO,
    "dppo": replace(DPPO, square_coef=1e-3),
    "dr. grpo": replace(PLAIN, aggregate="token_sum", sum_tokens=50),
    "truncated": replace(CURRENT, correction="truncate"),
    "icepop": replace(CURRENT, correction="token_mask"),
    "stream mask": replace(CURRENT, correction="stream_mask"),
    "masked ppo": replace(PLAIN, correction="token_mask"),
    "k2": replace(PLAIN, kl_coef=0.1, kl="k2"),
    "k1 in the reward": replace(PLAIN, kl_coef=0.1, kl="k1", kl_in="reward"),
}

STREAM = np.array([0, 0, 0, 0, 0, 2, 2, 2])
TURN = np.array([0, 0, 1, 1, 1, 0, 3, 3])
UNITS = BatchUnits.of(STREAM, TURN)
COUNTS = TargetCounts(targets=8, turns=4, streams=2)


def of(config, logp, behaviour, advantage, units=UNITS, counts=COUNTS, reference=None):
    """(loss, gradient by logp, sums), in float64."""
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    given_ = [torch.tensor(v, dtype=torch.float64) for v in (behaviour, advantage)]
    if reference is not None:
        reference = torch.tensor(reference, dtype=torch.float64)
    loss, sums = policy_loss(
        logp, *given_, config, normaliser=normaliser_of(config, counts), units=units, reference=reference
    )
    loss.backward()
    return loss.item(), logp.grad.numpy(), {name: value.item() for name, value in sums.items()}


def alone(config, logp, behaviour, advantage):
    """The same of one token."""
    units = BatchUnits.of(np.zeros(1, int), np.zeros(1, int))
    loss, gradient, sums = of(
        config, [logp], [behaviour], [advantage], units, TargetCounts(targets=1, turns=1, streams=1)
    )
    return loss, gradient[0], sums


# --- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (2.0, -1.0, -2.0, -2.0),
        (3.5, -1.0, -3.0, 0.0),  # as dear as three times, and no more
        (3.5, 1.0, 1.3, 0.0),
        (0.5, -1.0, -0.8, 0.0),
    ],
)
def test_dual_clip_bounds_what_a_bad_token_can_cost(ratio, advantage, objective, slope):
    loss, gradient, sums = alone(FAMILY["dual"], math.log(ratio), 0.0, advantage)
    assert (loss, gradient) == pytest.approx((-objective, -slope))
    assert sums["clip_share"] == float(slope == 0)


@pytest.mark.parametrize(("ratio", "weight"), [(0.01, 0.01), (1.0, 1.0), (4.5, 4.5), (7.0, 5.0)])
@pytest.mark.parametrize("advantage", [2.0, -1.5])
def test_cispo_clips_the_weight_and_keeps_the_gradient(ratio, weight, advantage):
    logp = -0.5
    loss, gradient, sums = alone(CISPO, logp, logp - math.log(ratio), advantage)
    assert (loss, gradient) == pytest.approx((-weight * advantage * logp, -weight * advantage))
    assert sums["clip_share"] == float(ratio > 5)


@pytest.mark.parametrize(
    ("now", "old", "advantage", "kept"),
    [
        (0.6, 0.3, 1.0, False),  # a good token that is 0.3 likelier already
        (0.6, 0.3, -1.0, True),
        (0.3, 0.6, -1.0, False),
        (0.3, 0.6, 1.0, True),
        (0.5, 0.4, 1.0, True),
        (0.02, 0.001, 1.0, True),  # twenty times as likely, and rare all the same: the ratio's clip would drop it
    ],
)
def test_dppo_leaves_out_tokens_whose_probability_has_moved_too_far(now, old, advantage, kept):
    logp = math.log(now)
    loss, gradient, sums = alone(DPPO, logp, math.log(old), advantage)
    weight = now / old if kept else 0.0
    assert (loss, gradient) == pytest.approx((-weight * advantage * logp, -weight * advantage))
    assert sums["clip_share"] == float(not kept)


def test_dppo_bounds_the_ratio_and_pulls_log_probs_together():
    loss, gradient, _ = alone(replace(DPPO, square_coef=0.01), math.log(0.4), math.log(0.01), -1.0)
    apart = math.log(40)
    assert loss == pytest.approx(20 * math.log(0.4) + 0.01 * apart**2)
    assert gradient == pytest.approx(20 + 0.02 * apart)


@pytest.mark.parametrize(
    ("ratio", "truncated", "icepop", "masked"),
    [(0.25, 0.25, 0.0, 0.0), (0.75, 0.75, 0.75, 1.0), (1.5, 1.5, 1.5, 1.0), (3.0, 2.0, 0.0, 0.0)],
)
def test_corrections_weigh_a_token_by_its_ratio_and_never_count_it_twice(ratio, truncated, icepop, masked):
    behaviour = -math.log(ratio)
    for name, weight in (("truncated", truncated), ("icepop", icepop), ("stream mask", icepop)):
        loss, gradient, sums = alone(FAMILY[name], 0.0, behaviour, 0.7)
        assert (loss, gradient) == pytest.approx((-0.7 * weight,) * 2)
        assert sums["masked_share"] == float(weight == 0)
        assert sums["correction_weight"] == pytest.approx(weight)
    _, gradient, _ = alone(FAMILY["masked ppo"], 0.0, behaviour, -0.7)
    clipped = 0.0 if ratio < 0.8 else ratio
    assert gradient == pytest.approx(0.7 * clipped * masked)


def test_k2_is_half_the_square_and_its_gradient_the_difference():
    config = FAMILY["k2"]
    units = BatchUnits.of(np.zeros(2, int), np.zeros(2, int))
    counts = TargetCounts(targets=2, turns=1, streams=1)
    loss, gradient, sums = of(config, [-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0], units, counts, reference=[-1.5, -1.0])
    assert loss == pytest.approx(0.1 * (0.125 + 0.5) / 2)
    assert gradient == pytest.approx([0.1 * 0.5 / 2, 0.1 * -1.0 / 2])
    assert sums["kl"] == pytest.approx(0.625)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_is_that_of_the_sampler_and_of_the_rest_of_the_turn(kl):
    behaviour = np.linspace(-2.0, -0.5, 8)
    reference = behaviour + np.array([0.3, -0.4, 0.1, 0.2, -0.6, 0.5, -0.1, 0.7])
    logp, advantage = behaviour + 0.05, np.linspace(-1, 1, 8)
    d = reference - behaviour
    cost = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[kl]
    # Turns are tokens 0-1 and 2-4 of one stream, 5 and 6-7 of the other.
    to_go = np.concatenate([np.cumsum(cost[a:b][::-1])[::-1] for a, b in ((0, 2), (2, 5), (5, 6), (6, 8))])
    config = replace(PLAIN, kl_coef=0.25, kl=kl, kl_in="reward")
    loss, gradient, sums = of(config, logp, behaviour, advantage, reference=reference)
    plain = of(PLAIN, logp, behaviour, advantage - 0.25 * to_go)
    assert loss == pytest.approx(plain[0], abs=1e-12)
    assert gradient == pytest.approx(plain[1], abs=1e-12)
    assert sums.pop("kl") == pytest.approx(cost.sum())
    assert sums == pytest.approx(plain[2])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_sums_to_go_are_those_of_a_loop(labels, data):
    values = data.draw(st.lists(st.floats(-2, 2), min_size=len(labels), max_size=len(labels)))
    found = Units.by(np.array(labels)).to_go(torch.tensor(values, dtype=torch.float64))
    expected = [
        sum(v for v, label in zip(values[i:], labels[i:], strict=True) if label == labels[i])
        for i in range(len(labels))
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_kl_in_the_reward_pulls_towards_the_reference_by_the_gradient_of_a_turns_kl():
    """Over all turns of two tokens from a small vocabulary: the expected gradient is that of the KL of whole turns."""
    generator = torch.Generator().manual_seed(0)
    first, then = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((3,), (3, 3)))
    ref_first, ref_then = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3,), (3, 3)))
    logp = first.log_softmax(0)[:, None] + then.log_softmax(1)
    exact = (logp.exp() * (logp - ref_first.log_softmax(0)[:, None] - ref_then.log_softmax(1))).sum()
    wanted = torch.autograd.grad(exact, (first, then))
    config = replace(PLAIN, kl_coef=1.0, kl="k1", kl_in="reward")
    units = BatchUnits.of(np.zeros(2, int), np.zeros(2, int))
    loss = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            mine = torch.stack([first.log_softmax(0)[a], then.log_softmax(1)[a, b]])
            other = torch.stack([ref_first.log_softmax(0)[a], ref_then.log_softmax(1)[a, b]])
            value, _ = policy_loss(
                mine, mine.detach(), torch.zeros(2).double(), config, normaliser=1.0, units=units, reference=other
            )
            loss = loss + logp[a, b].exp().detach() * value
    for found, gradient in zip(torch.autograd.grad(loss, (first, then)), wanted, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-12, rtol=0)


def test_the_entropy_bonus_is_of_chosen_tokens_and_lifts_only_what_is_below_the_floor():
    entropy = torch.tensor([0.1, 0.5, 2.0, 0.3], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([True, True, True, False])
    assert entropy_bonus(entropy, chosen, 0.0).tolist() == [0.1, 0.5, 2.0, 0.0]
    bonus = entropy_bonus(entropy, chosen, 0.4)
    assert bonus.tolist() == [0.1, 0.4, 0.4, 0.0]
    bonus.sum().backward()
    assert entropy.grad.tolist() == [1.0, 0.0, 0.0, 0.0]


# --- streams and turns ------------------------------------------------------------------------------------------------

LOGP = [-1.0, -0.5, -0.2, -2.0, -0.7, -0.3, -1.2, -0.9]
BEHAVIOUR = [-1.1, -0.5, -0.4, -1.9, -0.7, -0.2, -1.0, -1.0]
ADVANTAGE = [1.0, 1.0, -0.5, -0.5, -0.5, 0.25, 2.0, 2.0]


@pytest.mark.parametrize(("ratio", "labels"), [("stream", [STREAM]), ("turn", [STREAM, TURN])])
def test_a_unit_is_clipped_as_a_whole_and_its_gradient_is_that_of_the_mean(ratio, labels):
    config = replace(PLAIN, ratio=ratio, aggregate=f"{ratio}_mean", clip_low=0.04, clip_high=0.04)
    loss, gradient, sums = of(config, LOGP, BEHAVIOUR, ADVANTAGE)
    keys = list(zip(*labels, strict=True))
    expected, slopes, clipped = 0.0, np.zeros(8), 0
    for key in set(keys):
        rows = [i for i, k in enumerate(keys) if k == key]
        s = math.exp(sum(LOGP[i] - BEHAVIOUR[i] for i in rows) / len(rows))
        for i in rows:
            a = ADVANTAGE[i]
            inside = min(s * a, min(max(s, 0.96), 1.04) * a)
            expected -= inside / len(rows)
            if inside == s * a:
                slopes[i] = -s * a / len(rows)
            else:
                clipped += 1
    units = len(set(keys))
    assert loss == pytest.approx(expected / units)
    assert gradient == pytest.approx(slopes / units)
    assert sums["clip_share"] == clipped > 0


def test_what_weighs_the_same_by_hand():
    by = {
        aggregate: of(replace(PLAIN, aggregate=aggregate, sum_tokens=sums), LOGP, LOGP, ADVANTAGE)[1]
        for aggregate, sums in (("token_mean", 0), ("turn_mean", 0), ("stream_mean", 0), ("token_sum", 40))
    }
    a = np.array(ADVANTAGE)
    assert by["token_mean"] == pytest.approx(-a / 8)
    assert by["turn_mean"] == pytest.approx(-a / np.array([2, 2, 3, 3, 3, 1, 2, 2]) / 4)
    assert by["stream_mean"] == pytest.approx(-a / np.array([5] * 5 + [3] * 3) / 2)
    assert by["token_sum"] == pytest.approx(-a / 80)


@pytest.mark.parametrize("aggregate", ["token_mean", "turn_mean", "stream_mean"])
def test_what_is_left_out_does_not_make_the_others_weigh_more(aggregate):
    config = replace(CURRENT, aggregate=aggregate, correction="token_mask")
    whole = of(config, LOGP, LOGP, ADVANTAGE)[1]
    far = [LOGP[0] - 5.0, *LOGP[1:]]
    masked = of(config, LOGP, far, ADVANTAGE)[1]
    assert masked[0] == 0 != whole[0]
    assert masked[1:].tolist() == whole[1:].tolist()


def test_a_stream_that_is_left_out_is_left_out_whole():
    config = replace(CURRENT, correction="stream_mask", correction_min=0.99, correction_max=1.01)
    _, gradient, sums = of(config, LOGP, [*LOGP[:5], *(v - 0.1 for v in LOGP[5:])], ADVANTAGE)
    assert gradient[:5] == pytest.approx(-np.array(ADVANTAGE[:5]) / 8)
    assert gradient[5:].tolist() == [0, 0, 0]
    assert sums["masked_share"] == 3


# --- the whole family -------------------------------------------------------------------------------------------------

FLOATS = st.floats(-3, 0)
TOKENS = st.lists(
    st.tuples(FLOATS, FLOATS, st.floats(-3, 3), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=24
)


def columns(tokens):
    logp, behaviour, advantage, stream, turn = (np.array(c) for c in zip(*tokens, strict=True))
    counts = TargetCounts(
        targets=len(tokens), turns=len(set(zip(stream, turn, strict=True))), streams=len(set(stream.tolist()))
    )
    return logp, behaviour, advantage, stream, turn, counts


@pytest.mark.parametrize("name", FAMILY)
@given(TOKENS)
@settings(max_examples=40, deadline=None)
def test_a_step_may_be_cut_between_streams(name, tokens):
    logp, behaviour, advantage, stream, turn, counts = columns(tokens)
    config = FAMILY[name]
    reference = logp - 0.3 if config.kl_coef else None

    def part(rows):
        units = BatchUnits.of(stream[rows], turn[rows])
        seen = None if reference is None else reference[rows]
        return of(config, logp[rows], behaviour[rows], advantage[rows], units, counts, seen)

    whole, gradient, sums = part(np.arange(len(tokens)))
    parts = [np.flatnonzero(stream == s) for s in np.unique(stream)]
    found = [part(rows) for rows in parts]
    assert sum(loss for loss, _, _ in found) == pytest.approx(whole, abs=1e-12)
    joined = np.zeros(len(tokens))
    for rows, (_, g, _) in zip(parts, found, strict=True):
        joined[rows] = g
    assert joined == pytest.approx(gradient, abs=1e-12)
    for metric, total in sums.items():
        assert sum(s[metric] for _, _, s in found) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("name", FAMILY)
@given(TOKENS)
@settings(max_examples=25, deadline=None)
def test_on_the_policys_own_samples_all_pull_where_advantages_point(name, tokens):
    """At ratio 1 nothing is clipped, nothing is left out, and every gradient is minus the advantage, weighted."""
    logp, _, advantage, stream, turn, counts = columns(tokens)
    config = replace(FAMILY[name], kl_coef=0.0)
    _, gradient, sums = of(config, logp, logp, advantage, BatchUnits.of(stream, turn), counts)
    plain = replace(PLAIN, aggregate=config.aggregate, sum_tokens=config.sum_tokens)
    _, expected, _ = of(plain, logp, logp, advantage, BatchUnits.of(stream, turn), counts)
    assert gradient == pytest.approx(expected, abs=1e-12)
    assert sums["clip_share"] == sums.get("masked_share", 0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("far", [21.0, 89.0, 800.0, 1e30, -89.0, -1e30])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("name", FAMILY)
def test_a_log_ratio_of_any_size_is_finite_in_all_of_them(name, advantage, far, dtype):
    logp = torch.tensor([min(0.0, far), -1.0], dtype=dtype, requires_grad=True)
    behaviour = torch.tensor([min(0.0, -far), -1.0], dtype=dtype)
    config = FAMILY[name]
    units = BatchUnits.of(np.array([0, 1]), np.array([0, 0]))
    reference = behaviour if config.kl_coef else None
    loss, sums = policy_loss(
        logp,
        behaviour,
        torch.full((2,), advantage, dtype=dtype),
        config,
        normaliser=2.0,
        units=units,
        reference=reference,
    )
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()
    assert all(value.isfinite() for value in sums.values())


@given(
    st.lists(st.tuples(FLOATS, FLOATS, st.floats(-3, 3), FLOATS), min_size=1, max_size=24), st.sampled_from([0.0, 0.1])
)
@settings(max_examples=100, deadline=None)
def test_the_former_loss_is_a_member_bit_for_bit(tokens, kl_coef):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = []
        for loss_of in (grpo_loss, former_loss):
            logp, behaviour, advantage, reference = (torch.tensor(c, dtype=dtype) for c in zip(*tokens, strict=True))
            logp.requires_grad_(True)
            loss, sums = loss_of(
                logp,
                behaviour,
                advantage,
                normaliser=7.0,
                clip_low=0.2,
                clip_high=0.3,
                reference=reference if kl_coef else None,
                kl_coef=kl_coef,
            )
            loss.backward()
            found.append((loss.detach(), logp.grad, sums))
        (loss, gradient, sums), (former, former_gradient, former_sums) = found
        assert torch.equal(loss, former)
        assert torch.equal(gradient, former_gradient)
        assert sums.keys() == former_sums.keys()
        assert all(torch.equal(sums[name], former_sums[name]) for name in sums)


def test_no_target_at_all_is_no_loss():
    units = BatchUnits.of(np.zeros(0, int), np.zeros(0, int))
    for config in FAMILY.values():
        loss, _, _ = of(config, [], [], [], units, reference=[] if config.kl_coef else None)
        assert loss == 0


def test_units_count_all_that_have_their_labels():
    assert UNITS.turn.counts.tolist() == [2, 3, 1, 2]
    assert UNITS.stream.size(torch.zeros(8)).tolist() == [5.0] * 5 + [3.0] * 3
    values = torch.arange(8.0)
    assert Units.by(STREAM).mean(values).tolist() == [2.0] * 5 + [6.0] * 3


# --- what makes no sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"policy_loss": "trpo"}, r"algorithm\.policy_loss='trpo' is not one of ppo, cispo, dppo"),
        ({"kl": "k1"}, r"algorithm\.kl=k1 with algorithm\.kl_in=loss: its gradient is 0 in expectation"),
        ({"kl": "k4"}, r"algorithm\.kl='k4' is not one of k1, k2, k3"),
        ({"kl_in": "both"}, r"algorithm\.kl_in='both' is not one of loss, reward"),
        ({"correction": "tis"}, r"algorithm\.correction='tis' is not one of"),
        ({"correction": "truncate"}, r"would count it twice; use algorithm\.old_policy=current"),
        ({"policy_loss": "cispo", "ratio": "turn"}, r"algorithm\.ratio=turn with algorithm\.policy_loss=cispo"),
        ({"policy_loss": "dppo", "dual_clip": 3.0}, r"algorithm\.dual_clip=3\.0 with algorithm\.policy_loss=dppo"),
        ({"old_policy": "current", "ratio": "stream"}, r"algorithm\.old_policy=current: its ratio is 1"),
        ({"old_policy": "current", "policy_loss": "cispo"}, r"algorithm\.old_policy=current: its ratio is 1"),
        ({"aggregate": "token_sum"}, r"algorithm\.sum_tokens=0 with algorithm\.aggregate=token_sum"),
        ({"sum_tokens": 9}, r"algorithm\.sum_tokens=9 with algorithm\.aggregate=token_mean"),
        ({"dual_clip": 0.5}, r"algorithm\.dual_clip=0\.5 must be 0 \(off\) or above 1"),
        ({"dual_clip": float("nan")}, r"algorithm\.dual_clip=nan"),
        ({"correction_max": 0.9}, r"algorithm\.correction_max=0\.9 above 1"),
        ({"correction_min": 0.0}, r"algorithm\.correction_min=0\.0 must lie in \(0, 1\)"),
        ({"square_coef": -1.0}, r"algorithm\.square_coef=-1\.0"),
        ({"entropy_coef": -0.1}, r"algorithm\.entropy_coef=-0\.1"),
        ({"entropy_floor": 0.3}, r"algorithm\.entropy_floor=0\.3 without algorithm\.entropy_coef"),
        ({"entropy_kinds": ("thought",)}, r"algorithm\.entropy_kinds=\['thought'\] must name some of think, decision"),
        ({"entropy_kinds": ()}, r"algorithm\.entropy_kinds=\[\]"),
        ({"clip_low": 1.0}, r"algorithm\.clip_low=1\.0"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_with_the_reason(values, says):
    with pytest.raises(ValueError, match=says):
        replace(PLAIN, **values)

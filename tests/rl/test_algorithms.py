"""Algorithms: advantages of a group by hand, what a failed reward costs, and what goes to the learner for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.training import ADVANTAGES, AlgorithmConfig
from learner.losses.config import PolicyGradientConfig
from learner.messages import Runs
from rewards import RewardResult
from rl.algorithms.advantages import EPSILON, centred, leave_one_out, normalised, whitened
from rl.algorithms.base import train_batch
from rl.algorithms.table import ALGORITHMS, make_algorithm
from rl.results import ReadyGroup
from streams.messages import GroupSummary

KINDS = {"grpo": normalised, "mean": centred, "rloo": leave_one_out}


def config_of(kind, **values):
    return AlgorithmConfig(advantage=kind, clip_low=0.1, clip_high=0.3, kl_coef=0.01, **values)


def group_of(rewards, targets, name="0/a"):
    """A scored group; None is a reward that failed. targets: of each stream, by turn."""
    results = tuple(
        RewardResult(0.0, {}, (), failed="it raised") if r is None else RewardResult(r, {}, ()) for r in rewards
    )
    summary = GroupSummary(name, "a", 0, targets=tuple(tuple(t) for t in targets), log_tokens=77)
    return ReadyGroup(summary, "payload", results)


# --- advantages of streams --------------------------------------------------------------------------------------------


def test_advantages_of_a_group_by_hand():
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    assert centred(rewards) == pytest.approx([0.5, -0.5, -0.5, 0.5])
    assert normalised(rewards) == pytest.approx(np.array([1, -1, -1, 1]) * 0.5 / (0.5 + 1e-5))
    assert leave_one_out(rewards) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    # The population's standard deviation, not the sample's: sqrt(2/3) over 0, 1, 2.
    assert normalised(np.array([0.0, 1.0, 2.0]))[2] == pytest.approx(1 / (math.sqrt(2 / 3) + 1e-5))


REWARDS = st.lists(st.floats(0, 1), min_size=2, max_size=16).map(np.array)


@given(REWARDS, st.sampled_from(["grpo", "mean", "rloo"]))
def test_advantages_have_mean_zero_keep_the_order_and_are_bounded(rewards, kind):
    advantages = KINDS[kind](rewards)
    assert advantages.dtype == np.float64
    assert abs(advantages.mean()) < 1e-6
    assert (np.diff(advantages[np.argsort(rewards, kind="stable")]) >= 0).all()
    scale = {
        "grpo": rewards.std() / (rewards.std() + EPSILON),
        "mean": rewards.std(),
        "rloo": rewards.std() * len(rewards) / (len(rewards) - 1),
    }[kind]
    assert advantages.std() == pytest.approx(scale, abs=1e-9)


@given(REWARDS, st.floats(-2, 2))
def test_a_constant_added_to_all_rewards_changes_no_advantage(rewards, constant):
    for of_rewards in KINDS.values():
        # Rounding of the sum, magnified at most by 1 / epsilon.
        assert of_rewards(rewards + constant) == pytest.approx(of_rewards(rewards), abs=1e-9)


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo"])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_a_group_of_equal_rewards_has_no_advantage(kind, value):
    assert KINDS[kind](np.full(6, value)).tolist() == [0.0] * 6


def test_group_normalisation_of_a_single_stream_and_an_unknown_kind_are_refused_by_their_keys():
    with pytest.raises(ValueError, match=r"algorithm\.group_size=1"):
        normalised(np.array([1.0]))
    assert centred(np.array([1.0])).tolist() == [0.0]
    unknown = config_of("mean")
    object.__setattr__(unknown, "advantage", "ppo")
    with pytest.raises(ValueError, match=r"algorithm\.advantage='ppo' is not one of grpo, mean, rloo"):
        make_algorithm(unknown)


def test_every_algorithm_can_be_configured_and_every_name_of_the_configuration_has_one():
    assert tuple(ALGORITHMS) == ADVANTAGES


# --- algorithms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo"])
def test_every_target_of_a_stream_has_the_streams_advantage(kind):
    targets = ([3, 0, 2], [1, 1, 1], [0, 0, 0], [4, 0, 0])
    found = make_algorithm(config_of(kind)).advantages(group_of([1.0, 0.25, 0.5, 0.0], targets))
    expected = KINDS[kind](np.array([1.0, 0.25, 0.5, 0.0]))
    assert [values.dtype for values in found] == [np.float64] * 4
    assert [values.tolist() for values in found] == [[expected[0]] * 5, [expected[1]] * 3, [], [expected[3]] * 4]


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo"])
def test_a_failed_reward_has_no_advantage_and_does_not_count_in_its_group(kind):
    algorithm = make_algorithm(config_of(kind))
    found = algorithm.advantages(group_of([1.0, None, 0.25], [[2], [3], [1]]))
    first, last = KINDS[kind](np.array([1.0, 0.25]))
    assert [values.tolist() for values in found] == [[first] * 2, [0.0] * 3, [last]]
    alone = algorithm.advantages(group_of([None, 1.0], [[2], [1]]))
    assert [values.tolist() for values in alone] == [[0.0] * 2, [0.0]], "one alone has nothing to be compared with"


def test_the_algorithms_are_those_that_the_config_takes_and_their_loss_has_its_settings():
    for kind in ALGORITHMS:
        assert make_algorithm(config_of(kind)).loss == PolicyGradientConfig(0.1, 0.3, 0.01)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        AlgorithmConfig(advantage="none")
    assert str(refused.value).endswith("is not one of " + ", ".join(ALGORITHMS))


# --- what a batch does to advantages --------------------------------------------------------------------------------


def test_whitening_counts_tokens_and_a_batch_of_equals_is_worth_nothing():
    # Three tokens of 1 and one of 0: mean 3/4, variance 3/16.
    long, short = whitened([np.ones(3), np.zeros(1)])
    std = math.sqrt(3 / 16) + EPSILON
    assert long == pytest.approx(np.full(3, 0.25 / std), abs=1e-15)
    assert short == pytest.approx([-0.75 / std], abs=1e-15)
    assert [values.tolist() for values in whitened([np.full(2, 0.25), np.zeros(0), np.full(1, 0.25)])] == [
        [0.0] * 2,
        [],
        [0.0],
    ]
    assert [len(values) for values in whitened([np.zeros(0)])] == [0]
    assert whitened([]) == []


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 9)), min_size=1, max_size=12), st.floats(-3, 3))
def test_whitened_tokens_have_mean_zero_and_spread_one_and_forget_what_all_have(streams, constant):
    values = [np.full(tokens, reward) for reward, tokens in streams]
    pooled = np.concatenate(values)
    found = np.concatenate(whitened(values))
    assert abs(found.sum()) < 1e-6
    if len(pooled):
        assert found.std() == pytest.approx(pooled.std() / (pooled.std() + EPSILON), abs=1e-9)
    assert np.concatenate(whitened([v + constant for v in values])) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("kind", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_pp_whitens_the_tokens_of_a_step_without_streams_whose_reward_failed(kind):
    groups = [
        group_of([1.0, None, 0.0], [[2, 1], [5, 5], [1, 0]], name="0/a"),
        group_of([0.5, 0.5], [[1, 1], [4, 0]], name="0/b"),
    ]
    batch = train_batch(0, make_algorithm(config_of(kind)), groups)
    found = [[runs.expand() for runs in group.advantages] for group in batch.groups]
    if kind == "reinforce_pp":
        plain = [1.0] * 3 + [0.0] + [0.5] * 6
    else:
        plain = [0.5] * 3 + [-0.5] + [0.0] * 6
    expected = (np.array(plain) - np.mean(plain)) / (np.std(plain) + EPSILON)
    scored = np.concatenate([found[0][0], found[0][2], found[1][0], found[1][1]])
    assert scored == pytest.approx(expected, abs=1e-12)
    assert found[0][1].tolist() == [0.0] * 10
    assert scored.sum() == pytest.approx(0, abs=1e-9)


def test_reinforce_pp_without_baseline_learns_from_groups_of_one_and_the_others_leave_a_batch_as_it_is():
    groups = [group_of([reward], [[1]]) for reward in (1.0, 0.0)]
    alone = train_batch(0, make_algorithm(config_of("reinforce_pp", group_size=1)), groups)
    assert [runs.expand()[0] for g in alone.groups for runs in g.advantages] == pytest.approx([1, -1], abs=1e-4)
    for kind in ("grpo", "mean", "rloo"):
        algorithm = make_algorithm(config_of(kind))
        each = [algorithm.advantages(group) for group in groups]
        assert algorithm.over_batch(groups, each) is each


def test_credit_by_turn_is_whitened_as_the_streams_own_algorithm_has_it():
    groups = [group_of([1.0, 0.0], [[2, 1], [1, 1]]), group_of([0.5, 0.25], [[1, 1], [3, 0]])]
    algorithm = make_algorithm(config_of("reinforce_pp_baseline", credit="turn", turn_weight=0.0))
    by_turn, by_stream = (
        train_batch(0, a, groups) for a in (algorithm, make_algorithm(config_of("reinforce_pp_baseline")))
    )
    for one, other in zip(by_turn.groups, by_stream.groups, strict=True):
        for a, b in zip(one.advantages, other.advantages, strict=True):
            assert a.expand() == pytest.approx(b.expand(), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"advantage": "grpo", "group_size": 1}, "algorithm.group_size=1 with algorithm.advantage=grpo"),
        ({"advantage": "reinforce_pp_baseline", "group_size": 1}, "algorithm.group_size=1"),
        ({"advantage": "reinforce_pp", "group_size": 1, "credit": "turn"}, "algorithm.credit=turn"),
        ({"advantage": "reinforce_pp", "zero_spread": "resample"}, "use algorithm.zero_spread=train"),
        ({"advantage": "reinforce_pp", "group_size": 1, "groups_per_step": 1}, "nothing to be compared with"),
    ],
)
def test_settings_under_which_nothing_could_be_compared_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        AlgorithmConfig(**values)


# --- what goes to the learner -----------------------------------------------------------------------------------------


def test_a_step_holds_its_groups_with_their_advantages_in_one_run_a_stream():
    groups = [group_of([1.0, 0.0], [[300] * 40, [200] * 40], name="0/a"), group_of([0.5, 0.5], [[1], [2]], name="0/b")]
    algorithm = make_algorithm(config_of("mean"))
    batch = train_batch(7, algorithm, groups)
    assert (batch.step, batch.loss, batch.publish) == (7, algorithm.loss, True)
    assert [(g.group, g.payload, g.tokens) for g in batch.groups] == [("0/a", "payload", 77), ("0/b", "payload", 77)]
    sent = [runs for group in batch.groups for runs in group.advantages]
    assert [runs.values.tolist() for runs in sent] == [[0.5], [-0.5], [0.0], [0.0]], "12,000 tokens are one number"
    assert [len(runs.expand()) for runs in sent] == [12_000, 8_000, 1, 2]


def test_an_algorithm_of_turns_needs_no_log():
    """The seam for credit by turn: what an algorithm is given suffices to give each turn's targets a value of their own."""

    class ByTurn:
        loss = PolicyGradientConfig(0.2, 0.2)

        def advantages(self, group):
            return tuple(np.repeat(np.arange(len(t)) + 10.0 * i, t) for i, t in enumerate(group.summary.targets))

        def over_batch(self, groups, advantages):
            return advantages

    batch = train_batch(0, ByTurn(), [group_of([1.0, 0.0], [[2, 0, 3], [1, 1, 1]])])
    first, second = batch.groups[0].advantages
    assert first.expand().tolist() == [0, 0, 2, 2, 2]
    assert (first.values.tolist(), first.lengths.tolist()) == ([0, 2], [2, 3])
    assert second.expand().tolist() == [10, 11, 12]


BITS = st.lists(st.sampled_from([0.0, -0.0, 0.5, 0.1, 0.1 + 2**-56, -1.5, math.inf, math.nan, 5e-324]), max_size=40)


@given(BITS)
def test_runs_give_back_the_same_bits_and_have_no_equal_neighbours(values):
    array = np.array(values, dtype=np.float64)
    runs = Runs.of(array)
    back = runs.expand()
    assert back.dtype == np.float64
    assert back.tobytes() == array.tobytes()
    assert runs.lengths.sum() == len(array)
    assert (runs.lengths >= 1).all()
    assert all(a.tobytes() != b.tobytes() for a, b in zip(runs.values[1:], runs.values[:-1], strict=True))

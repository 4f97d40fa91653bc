"""Credit per turn: by hand, what it equals at its ends, and what it sums to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.training import AlgorithmConfig
from rewards import RewardResult
from rewards.compose import AnswerResult
from rl.algorithms.advantages import centred
from rl.algorithms.table import make_algorithm
from rl.algorithms.turn_credit import factored, turn_advantages
from rl.results import ReadyGroup
from streams.messages import GroupSummary

pytestmark = pytest.mark.smoke


def group_of(streams, targets):
    """A scored group. streams: of each, (value, turn or None) by answer, or None for a reward that failed."""
    results = []
    for answers in streams:
        if answers is None:
            results.append(RewardResult(0.0, {}, (), failed="it raised"))
            continue
        given_ = tuple(
            AnswerResult(i, "recall", turn, 0, correct=value > 0, timing=value, value=value)
            for i, (value, turn) in enumerate(answers)
        )
        results.append(RewardResult(float(np.mean([value for value, _ in answers])), {}, given_))
    return ReadyGroup(GroupSummary("0/a", "a", 0, targets=tuple(map(tuple, targets))), "payload", tuple(results))


def algorithm(**values):
    return make_algorithm(AlgorithmConfig(advantage="mean", **({"credit": "turn"} | values)))


# --- one answer -------------------------------------------------------------------------------------------------------


def test_one_answer_by_hand():
    # Answered at turn 0 (wrong), 1 (right), 2 (half), never. V is 0.375 before turn 0, 0.5 after it, 0.25 after turn 1.
    values, answered = np.array([0.0, 1.0, 0.5, 0.0]), np.array([0, 1, 2, 2])
    td = factored(values, answered, 3, "td")
    assert td == pytest.approx(np.array([[-0.375, 0, 0], [0.125, 0.5, 0], [0.125, -0.25, 0.25], [0.125, -0.25, -0.25]]))
    ret = factored(values, answered, 3, "return")
    assert ret == pytest.approx(np.array([[-0.375, 0, 0], [0.625, 0.5, 0], [0.125, 0.0, 0.25], [-0.375, -0.5, -0.25]]))


STREAMS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=9)


@given(STREAMS, st.sampled_from(["td", "return"]))
def test_advantages_sum_to_zero_over_those_who_have_not_answered_and_are_zero_behind(streams, form):
    values, answered = (np.array(c) for c in zip(*streams, strict=True))
    found = factored(values, answered, 8, form)
    assert found.sum(0) == pytest.approx(np.zeros(8), abs=1e-12)
    assert not found[np.arange(8) > answered[:, None]].any()
    for t in range(8):
        if (answered >= t).sum() == 1:
            # Nobody to compare with.
            assert np.abs(found[answered >= t, t]).max() < 1e-12


@given(STREAMS)
def test_the_sum_over_turns_is_the_streams_centred_reward(streams):
    """TD telescopes: what the turns changed adds up to what the stream came to, less what all came to on average."""
    values, answered = (np.array(c) for c in zip(*streams, strict=True))
    assert factored(values, answered, 8, "td").sum(1) == pytest.approx(centred(values), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.integers(1, 6))
def test_rewards_at_the_last_turn_alone_are_stream_credit_or_the_last_turns(values, turns):
    values, last = np.array(values), np.full(len(values), turns - 1)
    assert factored(values, last, turns, "return") == pytest.approx(np.tile(centred(values)[:, None], turns))
    td = factored(values, last, turns, "td")
    assert td[:, :-1] == pytest.approx(np.zeros((len(values), turns - 1)), abs=1e-12)
    assert td[:, -1] == pytest.approx(centred(values))


def test_before_anybody_answers_the_td_form_gives_nothing():
    td = factored(np.array([1.0, 0.0, 0.5]), np.array([3, 4, 5]), 6, "td")
    assert td[:, :3] == pytest.approx(np.zeros((3, 3)))
    assert td[:, 3].any()


# --- groups -----------------------------------------------------------------------------------------------------------


def test_several_answers_add_up_each_with_its_part_of_the_reward():
    group = group_of([[(1.0, 0), (0.0, None)], [(0.0, 1), (1.0, 2)]], [[1, 1, 1]] * 2)
    first = factored(np.array([0.5, 0.0]), np.array([0, 1]), 3, "td")
    second = factored(np.array([0.0, 0.5]), np.array([2, 2]), 3, "td")
    assert turn_advantages(group, "td") == pytest.approx(first + second)


def test_every_target_of_a_turn_has_the_turns_advantage_and_weight_zero_is_stream_credit():
    group = group_of([[(1.0, 0)], [(0.0, 1)], [(0.5, 2)]], [[2, 3, 1], [1, 0, 2], [0, 4, 1]])
    by_turn = turn_advantages(group, "td")
    whole = algorithm(credit="stream").advantages(group)
    found = algorithm().advantages(group)
    assert [a.tolist() for a in found] == [
        np.repeat(t, n).tolist() for t, n in zip(by_turn, group.summary.targets, strict=True)
    ]
    none = algorithm(turn_weight=0.0).advantages(group)
    assert [a.tobytes() for a in none] == [a.tobytes() for a in whole]
    half = algorithm(turn_weight=0.5).advantages(group)
    for a, b, c in zip(half, found, whole, strict=True):
        assert a == pytest.approx((b + c) / 2)


def test_a_failed_reward_has_no_advantage_and_is_in_no_baseline():
    targets = [[1, 1]] * 3
    found = turn_advantages(group_of([[(1.0, 0)], None, [(0.0, 1)]], targets), "td")
    assert not found[1].any()
    assert found[[0, 2]] == pytest.approx(turn_advantages(group_of([[(1.0, 0)], [(0.0, 1)]], targets[:2]), "td"))
    assert not turn_advantages(group_of([None, [(1.0, 0)]], targets[:2]), "td").any(), "nothing to compare with"


def test_streams_of_unequal_turns_are_refused_by_name():
    with pytest.raises(ValueError, match=r"group 0/a: streams of 1 to 2 turns; algorithm\.credit=turn compares"):
        turn_advantages(group_of([[(1.0, 0)], [(0.0, 0)]], [[1, 1], [1]]), "td")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"credit": "token"}, r"algorithm\.credit='token' is not one of stream, turn"),
        ({"turn_form": "gae"}, r"algorithm\.turn_form='gae' is not one of td, return"),
        ({"turn_weight": 1.5}, r"algorithm\.turn_weight=1\.5 must lie in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_their_keys(values, says):
    with pytest.raises(ValueError, match=says):
        replace(AlgorithmConfig(), **values)

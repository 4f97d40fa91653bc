"""A stage that ends once its reward is high enough: when, after a resume, too, and what it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.training import AlgorithmConfig
from rl.results import RLResult
from rl.saturation import Saturation
from rl.step_report import StepReport
from tests.support.configs import composed
from tests.support.stage import stage_context


def steps(*rewards):
    return [{"reward/total": reward} for reward in rewards]


def ended(saturation, values):
    """The number of steps after which it ends; None if it does not."""
    for i, step in enumerate(values, 1):
        saturation.see(step)
        if saturation.reached is not None:
            return i
    return None


@pytest.mark.parametrize(
    ("rewards", "end"),
    [
        ([0.9, 0.9, 0.9], 3),
        ([1.0, 1.0, 0.6, 0.9, 0.9, 0.9], 6),
        ([1.0, 1.0, 0.7], 3),
        ([1.0, 1.0], None),
        ([0.89] * 9, None),
        # Steps without a reward, of earlier versions' journals, are no steps.
        ([0.9, None, 0.9, 0.9], 4),
    ],
)
def test_it_ends_with_the_first_steps_whose_mean_is_high_enough(rewards, end):
    config = AlgorithmConfig(stop_when=0.9, stop_steps=3)
    assert ended(Saturation(config), steps(*rewards)) == end
    assert ended(Saturation(AlgorithmConfig(stop_steps=3)), steps(*rewards)) is None, "0 is never"


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=12), st.integers(0, 12), st.integers(1, 4))
def test_a_stage_that_is_resumed_comes_to_the_same_end(rewards, cut, window):
    config = AlgorithmConfig(stop_when=0.5, stop_steps=window)
    values = steps(*rewards)
    end = ended(Saturation(config), values)
    before = values[: cut if end is None else min(cut, end)]
    resumed = Saturation(config, before)
    if resumed.reached is not None:
        assert end == len(before)
    else:
        rest = ended(resumed, values[len(before) :])
        assert end == (None if rest is None else len(before) + rest)


@pytest.mark.parametrize("stop_when", [-0.1, float("nan"), float("inf")])
def test_a_reward_that_none_can_have_is_refused(stop_when):
    with pytest.raises(ValueError, match=r"algorithm\.stop_when="):
        AlgorithmConfig(stop_when=stop_when)
    with pytest.raises(ValueError, match=r"algorithm\.stop_steps=0 must be at least 1"):
        AlgorithmConfig(stop_steps=0)


def test_the_stage_is_told_and_says_where_it_ends(tmp_path):
    config = composed(f"run_root={tmp_path}", "algorithm.stop_when=0.9", "algorithm.stop_steps=2")
    context, told = stage_context(config, "rl", steps=12)
    result = RLResult()
    assert StepReport(context, steps(1.0, 0.7)).last_step(2, result) == 12
    assert (result.saturated_at, told.said) == (None, [])
    assert StepReport(context, steps(0.9, 1.0)).last_step(2, result) == 2
    assert (result.saturated_at, context.steps) == (0.95, 2)
    assert told.said == [
        "rl: ends with step 2 of 12: the mean reward of the last 2 steps is 0.950 (algorithm.stop_when=0.9)"
    ]
    assert RLResult.restore(result.counters()).saturated_at == 0.95
    # At its last step anyway: nothing to say.
    assert StepReport(context, steps(0.9, 1.0)).last_step(2, result) == 2
    assert len(told.said) == 1

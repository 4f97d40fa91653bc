"""Groups that cannot be trained are dropped and named; a run in which no other comes any more ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from conf.age import AgeBound
from rewards import RewardResult
from rl.buffer import GroupBuffer
from rl.loop import RLLoop
from rl.results import RLResult

FAILED = RewardResult(0.0, {}, (), failed="stream a: reward.terms.mine: KeyError: 'gone'")
SCORED = RewardResult(0.5, {}, ())


@pytest.fixture
def loop():
    """As much of the loop as takes scores."""
    made = RLLoop.__new__(RLLoop)
    made.config = SimpleNamespace(algorithm=SimpleNamespace(groups_in_flight=4))
    made.buffer, made.result, made.dropped = GroupBuffer(AgeBound(4, 2, 1)), RLResult(), []
    made.said = []
    made.progress = SimpleNamespace(say=made.said.append)
    made._dropped_in_a_row = 0
    return made


def score(loop, *results):
    loop._scored(results, SimpleNamespace(group="0/a"), None, loop.buffer.admit())


def test_a_group_without_any_reward_is_dropped_and_said(loop):
    score(loop, FAILED, FAILED)
    assert (loop.dropped, loop.result.dropped_groups, loop.buffer.untrained) == (["0/a"], 1, 0)
    assert loop.said == [f"rl: dropped group 0/a: every reward failed: {FAILED.failed}"]
    assert [sample.source for sample in loop.result.skipped] == ["stream 0/a/0", "stream 0/a/1"]


def test_a_reward_that_always_fails_ends_the_run_and_is_named(loop):
    for _ in range(50):
        score(loop, FAILED, FAILED)
    with pytest.raises(RuntimeError, match=r"51 groups in a row .*reward\.terms\.mine: KeyError.* mend the reward"):
        score(loop, FAILED, FAILED)


def test_one_that_fails_now_and_then_does_not(loop):
    for _ in range(60):
        score(loop, FAILED, FAILED)
        score(loop, FAILED, SCORED)
        loop.buffer.drop(loop.buffer.admitted - 1)
    assert loop.result.dropped_groups == 60

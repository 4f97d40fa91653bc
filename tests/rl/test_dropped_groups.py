"""Groups that cannot be trained are dropped and named; a run in which no other comes any more ends."""

from __future__ import annotations

import pytest

from rewards import RewardResult
from rl.loop import RLLoop
from streams.messages import GroupSummary
from tests.support.configs import composed
from tests.support.stage import stage_context
from tests.support.tasks import clip_task

FAILED = RewardResult(0.0, {}, (), failed="stream a: reward.terms.mine: KeyError: 'gone'")
SCORED = RewardResult(0.5, {}, ())


@pytest.fixture
def loop(tmp_path):
    """A loop whose actors are never called: replies are handed to it."""
    config = composed(f"run_root={tmp_path}", "algorithm.groups_in_flight=4", "algorithm.groups_per_step=4")
    context, told = stage_context(config, "rl", steps=50)
    made = RLLoop(context, (clip_task("a"),))
    made.said = told.said
    return made


def admitted(loop):
    return loop.dispatch.next(loop.version, left=1000)


def summary(assignment, **values):
    return GroupSummary(assignment.group, assignment.task.id, assignment.worker, **values)


def score(loop, *results):
    assignment = admitted(loop)
    assert loop.dispatch.returned(assignment, summary(assignment))
    loop._scored(results, summary(assignment, versions=(3, 4)), None, assignment)
    return assignment


def test_a_group_without_any_reward_is_dropped_and_said(loop):
    score(loop, FAILED, FAILED)
    assert (list(loop.stage.dropped), loop.result.dropped_groups, loop.buffer.untrained) == (["0/a"], 1, 0)
    assert loop.said == [f"rl: dropped group 0/a: every reward failed: {FAILED.failed} (weights versions 3, 4)"]
    assert [sample.source for sample in loop.result.skipped] == ["stream 0/a/0", "stream 0/a/1"]


def test_a_group_that_failed_at_its_worker_is_dropped_and_said(loop):
    assignment = admitted(loop)
    loop._rolled_out(summary(assignment, failed="no such file", clip_seconds=4.0), None, assignment)
    assert (list(loop.stage.dropped), loop.result.dropped_groups, loop.buffer.untrained) == (["0/a"], 1, 0)
    assert loop.said == ["rl: dropped group 0/a: no such file"]
    assert loop.result.dropped_clip_seconds == 4.0


def test_what_comes_of_a_group_that_was_assigned_again_is_ignored(loop):
    first = admitted(loop)
    loop.dispatch.reissue(0)
    loop.dispatch.restored(0, 0)
    second = admitted(loop)
    assert (second.ticket, second.group) == (first.ticket, first.group)
    loop._rolled_out(summary(first, failed="the worker is gone"), None, first)
    assert (list(loop.stage.dropped), loop.result.skipped, loop.said) == ([], [], [])
    assert loop.dispatch.returned(second, summary(second))
    loop._scored((FAILED, FAILED), summary(first), None, first)
    assert (list(loop.stage.dropped), loop.result.skipped, loop.said) == ([], [], [])
    loop._scored((SCORED, SCORED), summary(second), None, second)
    assert loop.buffer.ready == 1


def test_a_reward_that_always_fails_ends_the_run_and_is_named(loop):
    for _ in range(50):
        score(loop, FAILED, FAILED)
    with pytest.raises(RuntimeError, match=r"51 groups in a row .*reward\.terms\.mine: KeyError.* fix the reward"):
        score(loop, FAILED, FAILED)


def test_one_that_fails_now_and_then_does_not(loop):
    for _ in range(60):
        score(loop, FAILED, FAILED)
        loop.dispatch.drop(score(loop, FAILED, SCORED))
    assert loop.result.dropped_groups == 60

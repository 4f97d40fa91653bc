"""The metrics of a step, from the groups that it trained."""

from __future__ import annotations

from rewards.compose import RewardResult
from rl.metrics import StepClock, step_metrics
from rl.results import ReadyGroup, RLResult
from streams.messages import GroupSummary, TrainReport


def test_tokens_and_streams_that_began_anew_are_summed_over_the_groups_of_the_step():
    counted = ({"tokens": 5, "log_tokens": 40, "evicted_tokens": 7, "preempted": 2}, {"tokens": 1, "preempted": 1}, {})
    reward = RewardResult(1.0, {}, (), None)
    groups = [ReadyGroup(GroupSummary(f"0/{i}", "a", 0, **values), None, (reward,)) for i, values in enumerate(counted)]
    report = TrainReport(step=0, version=1, metrics={})
    found = step_metrics(report, groups, [0, 0, 0], [], StepClock(2.0, 0.5), 0, RLResult())
    names = ("tokens_per_s", "log_tokens", "evicted_tokens", "preempted")
    assert [found[f"rollout/{name}"] for name in names] == [3.0, 40.0, 7.0, 3.0]

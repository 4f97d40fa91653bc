"""The metrics of one RL step, by their documented names (docs/metrics.md). Pure.

Invariants:
* a quantity without a sample is None, never 0;
* the name of a user's reward term never equals one of our own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.results import ReadyGroup, RLResult
from runtime.tracking.metric_names import apart, metric_name
from streams.log.mismatch import LogpDiff
from streams.messages import SwapReport, TrainReport

TOTAL, ZERO_STD = "reward/total", "reward/zero_std_groups"
OWN = ("total", "group_std", "zero_std_groups", "failed_streams")
"""Names under `reward/` that are not terms."""


@dataclass(frozen=True)
class StepClock:
    """wall_s: seconds since the previous step. learner_busy: share of the stage's time in which the learner trained."""

    wall_s: float
    learner_busy: float


def step_metrics(
    report: TrainReport,
    groups: Sequence[ReadyGroup],
    ages: Sequence[int],
    swaps: Sequence[SwapReport],
    clock: StepClock,
    ready: int,
    result: RLResult,
) -> dict[str, float | None]:
    """Return everything that is charted about a step.

    Args:
        report: The learner's report.
        groups: What it trained.
        ages: Age of each group, in versions.
        swaps: Workers' swaps since the previous step.
        clock: Times of the step.
        ready: Groups that wait for a batch.
        result: What the stage has counted since it began.
    """
    results = [r for g in groups for r in g.results]
    monitor = LogpDiff.merge([g.summary.monitor for g in groups])
    return {
        "reward/total": mean_reward(groups),
        **{term_metric(name): float(np.mean([r.components[name] for r in results])) for name in results[0].components},
        "reward/group_std": float(np.mean([np.std([r.total for r in g.results]) for g in groups])),
        "reward/zero_std_groups": float(np.mean([_spread(g) == 0 for g in groups])),
        "reward/failed_streams": float(sum(r.failed is not None for r in results)),
        **{f"train/{name}": value for name, value in report.metrics.items()},
        "age/mean": float(np.mean(ages)),
        "age/max": float(max(ages)),
        "rollout/tokens_per_s": sum(g.summary.tokens for g in groups) / clock.wall_s,
        "rollout/log_tokens": float(sum(g.summary.log_tokens for g in groups)),
        "rollout/evicted_tokens": float(sum(g.summary.evicted_tokens for g in groups)),
        "rollout/preempted": float(sum(g.summary.preempted for g in groups)),
        "rollout/group_s": float(np.mean([g.summary.seconds for g in groups])),
        "rollout/dropped_groups": float(result.dropped_groups),
        "rollout/resampled_groups": float(result.given_up.groups),
        "buffer/ready": float(ready),
        "busy/learner": clock.learner_busy,
        "busy/workers": float(np.mean([s.busy_share for s in swaps])) if swaps else None,
        "swap/pause_s": max((s.pause_s for s in swaps), default=None),
        "swap/fetch_s": max((s.fetch_s for s in swaps), default=None),
        "mismatch/worker_max": monitor.max,
        "mismatch/worker_mean": monitor.mean,
        "mismatch/worker_k3": monitor.k3,
        "mismatch/worker_tokens": float(monitor.tokens),
        "step/wall_s": clock.wall_s,
    }


def term_metric(name: str) -> str:
    """Return the metric of a reward term. The term's name is the user's, so it is kept apart from our own names."""
    return metric_name(f"reward/{apart(name, OWN, '-term')}")


def _spread(group: ReadyGroup) -> float:
    """Return the range of the rewards that enter the advantages.

    Not their standard deviation: rounding makes that 1e-17 for equal rewards of 0.1.
    """
    totals = [result.total for result in group.results if result.failed is None]
    return max(totals) - min(totals) if totals else 0.0


def mean_reward(groups: Sequence[ReadyGroup]) -> float:
    """Return the mean reward of all streams of the groups."""
    return float(np.mean([r.total for g in groups for r in g.results]))

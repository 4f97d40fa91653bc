"""Evaluation while training: held-out streams on the rollout workers, between the training groups.

Training does not stop for it. The streams share the engines with the rollouts, a few at a time, and start on a worker
once it runs the version under evaluation. A worker may swap while such a stream runs: the oldest and newest version of
all streams are logged beside the result (with `algorithm.mode=sync` they are the same).

The learner scores the log of such a stream if it is still at the one version that sampled it and is not training. That
measures the mismatch of engine and learner on streams that nobody trained on. If the learner has moved on there is no
sample; with `sync` it waits.

Invariants:
* one evaluation runs at a time;
* every evaluation that is due is run or named as left out;
* its result goes into the journal under its version's step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evals.heldout import (
    Condition,
    WatchedStream,
    collect,
    learner_mismatch,
    reward_jobs,
    scored_streams,
    stream_request,
)
from rewards.compose import RewardResult
from rl.evaluated_stage import EvaluatedStage
from rl.workers import Workers
from runtime.tracking.metric_names import metric_name
from streams.data.dataset import at_row
from streams.log.mismatch import LogpDiff
from streams.messages import GroupSummary, RewardJob, RolloutTask, ScoreReport
from streams.task import StreamTask

SHARE = 4
"""An evaluation takes at most 1 / SHARE of the streams that an engine may run, but at least one."""


class LogScorer(Protocol):
    """The learner, as an evaluation sees it."""

    def score_log(self, summary: GroupSummary, payload: Any, handle: Callable[[ScoreReport | None], None]) -> bool:
        """Score a held-out stream for `handle`, which gets None if its media are lost.

        Returns False, and does nothing, if the learner is at other weights.
        """


@dataclass
class _Running:
    """The evaluation of one version. left: tasks to start. under_way: streams not yet over, or not yet scored."""

    version: int
    left: deque[StreamTask]
    under_way: int = 0
    watched: list[WatchedStream] = field(default_factory=list)
    diffs: list[LogpDiff] = field(default_factory=list)
    scoring: bool = False


class PeriodicEvaluation:
    """Runs an evaluation of every version it is given, and reports the result to the stage."""

    def __init__(self, stage: EvaluatedStage, workers: Workers, learner: LogScorer) -> None:
        self._stage, self._workers, self._learner = stage, workers, learner
        self._config = stage.context.config
        self._load = [0] * workers.ledger.workers
        self._per_worker = max(1, self._config.rollout.max_streams // SHARE)
        self._running: _Running | None = None
        self._next: int | None = None

    @property
    def active(self) -> bool:
        return self._running is not None

    def begin(self, version: int) -> None:
        """Evaluate `version` now, or as soon as the running evaluation is over. If several wait, only the last is run."""
        if self._running is not None:
            if self._next is not None:
                self._stage.context.progress.say(
                    f"eval: step {self._next} is left out, the evaluation of step {self._running.version} still runs"
                )
            self._next = version
            return
        self._running = _Running(version, deque(self._stage.heldout))
        self.pump()

    def pump(self) -> None:
        """Start streams on the workers that run the version, or a newer one, and have room."""
        running = self._running
        if running is None:
            return
        for worker in range(len(self._load)):
            while running.left and self._may_start(running, running.left[0], worker):
                self._start(running, running.left.popleft(), worker)
        if not running.left and not running.under_way and not running.scoring:
            running.scoring = True
            jobs = reward_jobs(running.watched)
            self._workers.score(
                jobs,
                f"the evaluation of step {running.version}",
                lambda scores: self._finish(running, jobs, scores),
            )

    def _may_start(self, running: _Running, task: StreamTask, worker: int) -> bool:
        return (
            self._workers.ledger.runs(worker, running.version)
            and self._load[worker] < self._per_worker
            and self._workers.suspects.may_take(worker, self._request(running, task).group)
        )

    def _request(self, running: _Running, task: StreamTask) -> RolloutTask:
        return stream_request(self._config, task, Condition("trained"), f"step{running.version}")

    def _start(self, running: _Running, task: StreamTask, worker: int) -> None:
        request = self._request(running, task)
        if self._given_up(running, request, worker):
            return
        self._load[worker] += 1
        running.under_way += 1
        self._workers.roll_out(
            worker,
            request,
            f"the evaluation of {task.id}",
            lambda summary, payload: self._watched(running, summary, payload, request, worker),
            lambda: self._lost(running, task, request, worker),
        )

    def _lost(self, running: _Running, task: StreamTask, request: RolloutTask, worker: int) -> None:
        """Let another worker, or the one that takes its place, watch the task, unless it ends them all."""
        self._load[worker] -= 1
        running.under_way -= 1
        if not self._given_up(running, request, worker):
            running.left.appendleft(task)
        self.pump()

    def _given_up(self, running: _Running, request: RolloutTask, worker: int) -> bool:
        """Count a stream that ends its workers as failed."""
        why, task = self._workers.suspects.condemned(request.group), request.task
        if why is not None:
            self._stage.context.progress.say(f"eval: failed {task.id}: {why}{at_row(task)}")
            running.watched.append(WatchedStream(request, GroupSummary(request.group, task.id, worker, failed=why)))
        return why is not None

    def _watched(
        self, running: _Running, summary: GroupSummary, payload: Any, request: RolloutTask, worker: int
    ) -> None:
        self._load[worker] -= 1
        # The log is scored now or never. The payload's reference is not kept, so the object store can free it.
        running.watched.append(WatchedStream(request, summary))
        if summary.failed is not None or not self._learner.score_log(
            summary, payload, lambda report: self._compared(running, report, summary)
        ):
            running.under_way -= 1
        self.pump()

    def _compared(self, running: _Running, report: ScoreReport | None, summary: GroupSummary) -> None:
        running.under_way -= 1
        if report is not None:
            assert summary.versions == (report.version,), "the learner scored before it trained on"
            running.diffs.append(report.diff)
        self.pump()

    def _finish(self, running: _Running, jobs: Sequence[RewardJob], scores: Sequence[tuple[RewardResult, ...]]) -> None:
        result = collect("trained", scored_streams(running.watched, jobs, scores))
        versions = {version for stream in running.watched for version in stream.summary.versions}
        values = result.values | {
            "failed": float(len(result.skipped)),
            "oldest_version": float(min(versions)) if versions else None,
            "newest_version": float(max(versions)) if versions else None,
        }
        self._running = None
        metrics = {metric_name(f"eval/{key}"): value for key, value in values.items()}
        self._stage.evaluated(running.version, metrics | learner_mismatch(LogpDiff.merge(running.diffs)))
        if self._next is not None:
            version, self._next = self._next, None
            self.begin(version)

"""Evaluation while training: held-out streams on the rollout workers, between the training groups.

Nothing stops for it: the streams share the engines with the rollouts, a few at a time, and start on a worker
once it runs the version under evaluation. A worker may swap while such a stream runs; each stream's versions are known,
and the span of all of them is logged beside the result (with `algorithm.mode=sync` it is one version).
While the learner still stands at a stream's one version, and does not train, it scores that stream's log: the mismatch of
engine and learner on streams that nobody trained on. Where it has moved on there is no sample (`sync` waits for it).
Invariants: one evaluation at a time; every one that was due is run or named as left out; its result goes into the
journal under its version's step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conf.schema import RunConfig
from evals.best import evaluated
from evals.heldout import Condition, ScoredStream, collect, stream_request, watched_job
from rl.versions import WeightLedger
from runtime.cluster.events import Events
from runtime.cluster.session import Session
from runtime.mismatch_gate import Monitor
from runtime.tracking.metric_names import metric_name
from streams.log.mismatch import LogpDiff
from streams.messages import GroupSummary, RewardJob, RolloutTask, ScoreReport
from streams.task import StreamTask

SHARE = 4
"""An evaluation takes at most one in SHARE of an engine's streams."""


@dataclass
class _Running:
    version: int
    left: deque[StreamTask]
    under_way: int = 0
    jobs: list[RewardJob] = field(default_factory=list)
    failed: list[str | None] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    diffs: list[LogpDiff] = field(default_factory=list)
    scoring: bool = False


class PeriodicEvaluation:
    """Runs an evaluation for every version it is given; `done(version, metrics)` gets its result."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        events: Events,
        ledger: WeightLedger,
        tasks: tuple[StreamTask, ...],
        total: int,
        say: Callable[[str], None],
        done: Callable[[int, dict[str, float | None]], None],
        score: Callable[[GroupSummary, Any], Any | None],
        monitor: Monitor,
    ) -> None:
        """score: a reference to the learner's ScoreReport of a stream, None where it is at other weights."""
        self.config, self.session, self.events, self.ledger = config, session, events, ledger
        self.tasks = evaluated(config, tasks)
        self.total = total
        self._say, self._done, self._score, self._monitor = say, done, score, monitor
        self._load = [0] * len(session.workers)
        self._per_worker = max(1, config.rollout.max_streams // SHARE)
        self._running: _Running | None = None
        self._next: int | None = None

    @property
    def active(self) -> bool:
        return self._running is not None

    def due(self, step: int) -> bool:
        """Whether `eval.every` asks for an evaluation after `step` (the last step's always, if any is asked for)."""
        every = self.config.eval.every
        return bool(every) and bool(self.tasks) and (step % every == 0 or step == self.total)

    def begin(self, version: int) -> None:
        """Evaluate `version` now, or as soon as the evaluation before it has ended."""
        if self._running is not None:
            if self._next is not None:
                self._say(
                    f"eval: step {self._next} is left out, the evaluation of step {self._running.version} still runs"
                )
            self._next = version
            return
        self._running = _Running(version, deque(self.tasks))
        self.pump()

    def pump(self) -> None:
        """Start streams on the workers that run the version (or a newer one) and have room."""
        running = self._running
        if running is None:
            return
        for worker in range(len(self._load)):
            while running.left and self._load[worker] < self._per_worker and self._runs(worker, running.version):
                self._start(running, running.left.popleft(), worker)
        if not running.left and not running.under_way and not running.scoring:
            running.scoring = True
            self.events.expect(
                self.session.scorer.score.remote(tuple(running.jobs)),
                f"the scores of the evaluation of step {running.version}",
                lambda results: self._finish(running, [r[0] for r in results]),
            )

    def _runs(self, worker: int, version: int) -> bool:
        return self.ledger.running[worker] >= version

    def _start(self, running: _Running, task: StreamTask, worker: int) -> None:
        request = stream_request(self.config, task, Condition("trained"), f"step{running.version}")
        self._load[worker] += 1
        running.under_way += 1
        summary, payload = self.session.workers[worker].rollout.options(num_returns=2).remote(request)
        self.events.expect(
            summary,
            f"the evaluation of {task.id} on rollout worker {worker}",
            lambda value: self._watched(running, value, payload, request, worker),
        )

    def _watched(
        self, running: _Running, summary: GroupSummary, payload: Any, request: RolloutTask, worker: int
    ) -> None:
        self._load[worker] -= 1
        self._monitor.observe(f"rollout worker {worker}", summary.monitor, summary.off)
        scores = None if summary.failed is not None else self._score(summary, payload)
        if scores is None:
            running.under_way -= 1
        else:
            self.events.expect(
                scores,
                f"the learner's scores of {summary.group}",
                lambda report: self._compared(running, report, summary),
            )
        running.failed.append(summary.failed)
        running.versions.update(summary.versions)
        running.jobs.append(watched_job(request, summary))
        self.pump()

    def _compared(self, running: _Running, report: ScoreReport, summary: GroupSummary) -> None:
        assert summary.versions == (report.version,), "the learner scored before it trained on"
        running.under_way -= 1
        running.diffs.append(report.diff)
        self._monitor.observe("learner, on held-out logs", report.diff, report.off)
        self.pump()

    def _finish(self, running: _Running, results: list[Any]) -> None:
        result = collect(
            "trained",
            tuple(
                ScoredStream(job.task, job.plan, job.turns[0], score, failed=failed)
                for job, score, failed in zip(running.jobs, results, running.failed, strict=True)
            ),
        )
        values: dict[str, float | None] = {"reward": result.reward, "timing": result.timing}
        values |= {f"accuracy_{mode}": value for mode, value in result.accuracy.items()}
        values |= {
            "failed": float(len(result.skipped)),
            "oldest_version": float(min(running.versions)) if running.versions else None,
            "newest_version": float(max(running.versions)) if running.versions else None,
        }
        found = LogpDiff.merge(running.diffs)
        mismatch = {
            "mismatch/learner_max": found.max,
            "mismatch/learner_mean": found.mean,
            "mismatch/learner_k3": found.k3,
            "mismatch/learner_tokens": float(found.tokens),
        }
        self._running = None
        metrics = {metric_name(f"eval/{key}"): value for key, value in values.items()}
        self._done(running.version, metrics | mismatch)
        if self._next is not None:
            version, self._next = self._next, None
            self.begin(version)

"""The asynchronous RL loop: event-driven, no pause, bounded age.

Owner: rl. The driver only moves references and small summaries. It waits for whichever comes first of: a group rolled
out, a group scored, an optimiser step, a worker's swap, a checkpoint. Invariants: the age bound of `rl.buffer`; the two
live versions of `rl.weights`; every group admitted is trained, dropped by name, or left over at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from conf.schema import RunConfig
from rewards.compose import RewardResult
from rl.advantages import group_advantages
from rl.buffer import AgeBound, GroupBuffer
from rl.checkpoint import CheckpointState, commit, partial_path
from rl.cluster import Session
from rl.source import epochs, group_id
from rl.tracking import Progress, Tracker
from rl.weights import WeightLedger
from rollout.vision import ByteBudgetCache
from streams.dataset import SkippedSample
from streams.messages import (
    GroupSummary,
    RewardJob,
    RolloutTask,
    SwapReport,
    TrainBatch,
    TrainGroup,
    TrainReport,
    WorkerStats,
)
from streams.scoring.stats import LogpDiff
from streams.task import StreamTask


@dataclass(frozen=True)
class ReadyGroup:
    """A scored group: what the next batch is cut from."""

    summary: GroupSummary
    payload: Any
    results: tuple[RewardResult, ...]
    admitted: float


@dataclass
class RLResult:
    """What the RL stage reports. dropped_clip_seconds: video length of dropped groups, so that none vanish unseen."""

    steps: int = 0
    max_age: int = 0
    mean_reward_first: float | None = None
    mean_reward_last: float | None = None
    versions_seen: set[int] = field(default_factory=set)
    skipped: list[SkippedSample] = field(default_factory=list)
    dropped_groups: int = 0
    dropped_clip_seconds: float = 0.0
    monitor: LogpDiff = field(default_factory=LogpDiff)
    age0: LogpDiff = field(default_factory=LogpDiff)
    published: LogpDiff = field(default_factory=LogpDiff)
    sampled_tokens: int = 0
    clips_encoded: int = 0
    distinct_clips: int = 0
    seconds: float = 0.0


def _advantages(results: tuple[RewardResult, ...], kind: str) -> tuple[float, ...]:
    """One advantage per stream; a stream whose reward failed has none (0) and does not count in its group's mean."""
    scored = [i for i, result in enumerate(results) if result.failed is None]
    advantages = np.zeros(len(results))
    if len(scored) > 1:
        advantages[scored] = group_advantages(np.array([results[i].total for i in scored]), kind)
    return tuple(float(a) for a in advantages)


class RLLoop:
    """One RL stage over a running session whose actors hold the starting checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        tasks: tuple[StreamTask, ...],
        tracker: Tracker,
        progress: Progress,
        streaming: dict[str, Any],
    ) -> None:
        self.config, self.session = config, session
        self.tracker, self.progress, self.streaming = tracker, progress, streaming
        algorithm = config.algorithm
        self.buffer: GroupBuffer[ReadyGroup] = GroupBuffer(
            AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, config.weights.max_lag)
        )
        self.ledger = WeightLedger(len(session.workers), config.weights.max_lag)
        self.result = RLResult()
        self.version = 0
        self.consumed: list[str] = []
        self._source = epochs(tasks, config.seed)
        self._pending: dict[Any, tuple[str, Callable[[Any], None]]] = {}
        self._load = [0] * len(session.workers)
        self._per_worker = max(1, config.rollout.max_streams // algorithm.group_size)
        # References keep features alive in the object store: the budget bounds what a long dataset may pin there.
        self._features: ByteBudgetCache[Any] = ByteBudgetCache(config.data.cache_mb * 2**20)
        self._seen_tasks: set[str] = set()
        self._swaps: list[SwapReport] = []
        self._dropped_in_a_row = 0
        self._saves = 0
        self._began = time.monotonic()
        self._step_began = self._began
        self._learner_busy_s = 0.0
        self._training = False
        self._weights: Any = None

    def run(self) -> RLResult:
        """Train `algorithm.steps` optimiser steps, write the final checkpoint, report."""
        while self.version < self.config.algorithm.steps or self._saves:
            self._admit()
            self._train()
            self._wait_for_event()
        self._save("final")
        while self._saves or self.ledger.fetching:
            self._wait_for_event()
        self.result.published = self._score_published()
        for stats in self._worker_stats():
            self.result.sampled_tokens += stats.sampled_tokens
            self.result.clips_encoded += stats.clips_encoded
        self.result.distinct_clips = len(self._seen_tasks)
        self.result.steps = self.version
        self.result.seconds = time.monotonic() - self._began
        return self.result

    def _score_published(self) -> LogpDiff:
        """One group per worker on the weights it swapped in, scored by the learner that published them.

        This is what shows that publishing works: a swap that copied nothing, or named the wrong version, fails here.
        """
        payloads = []
        for i, worker in enumerate(self.session.workers):
            epoch, task = next(self._source)
            request = self._request(epoch, task, f"published-{i}/{task.id}")
            summary, payload = worker.rollout.options(num_returns=2).remote(request)
            if self.session.call(summary, f"a group on the published weights of worker {i}").failed is None:
                payloads.append(payload)
        report = self.session.call(self.session.learner.score.remote(tuple(payloads)), "the published weights' scores")
        return report.diff

    def _request(self, epoch: int, task: StreamTask, group: str) -> RolloutTask:
        data = self.config.data
        return RolloutTask(
            group=group,
            epoch=epoch,
            task=task,
            streams=self.config.algorithm.group_size,
            turns=task.num_turns(data.video.chunk_seconds, data.tail_chunks, data.max_turns),
            temperature=self.config.rollout.temperature,
            features=self._features.get(task.id),
        )

    # --- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        wanted = self.config.algorithm.steps * self.config.algorithm.groups_per_step
        while self.buffer.may_admit() and len(self.consumed) + self.buffer.untrained < wanted:
            free = [
                w
                for w in range(len(self._load))
                if self._load[w] < self._per_worker and self.ledger.may_work(w, self.version)
            ]
            if not free:
                return
            self._dispatch(min(free, key=lambda w: self._load[w]))

    def _dispatch(self, worker: int) -> None:
        epoch, task = next(self._source)
        ticket = self.buffer.admit()
        request = self._request(epoch, task, group_id(epoch, task))
        self._load[worker] += 1
        self._seen_tasks.add(task.id)
        summary, payload = self.session.workers[worker].rollout.options(num_returns=2).remote(request)
        admitted = time.monotonic()
        self._expect(
            summary,
            f"group {request.group} on rollout worker {worker}",
            lambda value: self._rolled_out(value, payload, task, ticket, worker, admitted),
        )

    def _rolled_out(
        self, summary: GroupSummary, payload: Any, task: StreamTask, ticket: int, worker: int, admitted: float
    ) -> None:
        self._load[worker] -= 1
        if summary.failed is not None:
            self._drop(summary, ticket, task)
            return
        if summary.features is not None:
            self._features.put(task.id, summary.features, summary.feature_bytes)
        job = RewardJob(summary.group, task, summary.turns, self.config.data.video.chunk_seconds)
        self._expect(
            self.session.scorer.score.remote((job,)),
            f"the scores of group {summary.group}",
            lambda results: self._scored(results[0], summary, payload, ticket, admitted),
        )

    def _drop(self, summary: GroupSummary, ticket: int, task: StreamTask) -> None:
        self.buffer.drop(ticket)
        self.result.skipped.append(SkippedSample(f"task {summary.task_id} ({task.video})", str(summary.failed)))
        self.result.dropped_groups += 1
        self.result.dropped_clip_seconds += summary.clip_seconds
        self.progress.say(f"rl: dropped group {summary.group}: {summary.failed}")
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row > max(50, 2 * self.config.algorithm.groups_in_flight):
            raise RuntimeError(
                f"{self._dropped_in_a_row} groups in a row were dropped; the last: {summary.failed}. "
                "Nothing is being learned: mend the data or the workers"
            )

    def _scored(
        self,
        results: tuple[RewardResult, ...],
        summary: GroupSummary,
        payload: Any,
        ticket: int,
        admitted: float,
    ) -> None:
        self._dropped_in_a_row = 0
        for i, result in enumerate(results):
            if result.failed is not None:
                name = f"stream {summary.group}/{i}"
                self.result.skipped.append(SkippedSample(name, f"reward: {result.failed}"))
        if all(result.failed is not None for result in results):
            self.result.dropped_groups += 1
            self.buffer.drop(ticket)
            return
        self.buffer.fulfil(ticket, ReadyGroup(summary, payload, results, admitted))

    # --- training -------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        if self._training or self.version >= self.config.algorithm.steps or not self.ledger.may_publish():
            return
        groups = self.buffer.next_batch()
        if groups is None:
            return
        algorithm = self.config.algorithm
        ages = [self.buffer.check_age(self.version, g.summary.oldest_version, g.summary.group) for g in groups]
        batch = TrainBatch(
            step=self.version,
            loss="grpo",
            groups=tuple(
                TrainGroup(
                    g.summary.group,
                    g.payload,
                    _advantages(g.results, algorithm.advantage),
                )
                for g in groups
            ),
            settings={"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high},
        )
        self._training = True
        report, weights = self.session.learner.train.options(num_returns=2).remote(batch)
        self._expect(
            report,
            f"optimiser step {self.version + 1}",
            lambda value: self._trained(value, weights, groups, ages),
        )

    def _trained(self, report: TrainReport, weights: Any, groups: list[ReadyGroup], ages: list[int]) -> None:
        self._training = False
        self.version = report.version
        self.buffer.trained()
        self.consumed += [g.summary.group for g in groups]
        self.result.max_age = max(self.result.max_age, *ages)
        for group in groups:
            self.result.versions_seen.update(group.summary.versions)
        self.result.monitor = LogpDiff.merge([self.result.monitor, *(g.summary.monitor for g in groups)])
        metrics = report.metrics
        if tokens := int(metrics.get("age0_tokens", 0)):
            age0 = LogpDiff(tokens, metrics["age0_logp_diff_mean"], metrics["age0_logp_diff_max"])
            self.result.age0 = LogpDiff.merge([self.result.age0, age0])
        self._publish(report.version, weights)
        self._report(report, groups, ages)
        every = self.config.checkpoint.every
        if every and self.version % every == 0 and self.version < self.config.algorithm.steps:
            self._save(f"step{self.version:06d}")

    def _publish(self, version: int, weights: Any) -> None:
        self.ledger.publish(version)
        self._weights = weights
        self._start_fetches()

    def _start_fetches(self) -> None:
        for worker in self.ledger.next_fetches():
            self._expect(
                self.session.workers[worker].update_weights.remote([self._weights]),
                f"rollout worker {worker} to swap to version {self.ledger.published}",
                self._swapped,
            )

    def _swapped(self, report: SwapReport) -> None:
        self.ledger.swapped(report.worker, report.version)
        self._swaps.append(report)
        self._start_fetches()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        final = self.config.root / "checkpoints" / "rl" / name
        partial = partial_path(final.resolve())
        state = CheckpointState("rl", self.version, self.version, tuple(self.consumed))
        self._saves += 1
        self._expect(
            self.session.learner.save.remote(str(partial), self.streaming),
            f"checkpoint {name}",
            lambda _: self._saved(partial, final.resolve(), state),
        )

    def _saved(self, partial: Path, final: Path, state: CheckpointState) -> None:
        commit(partial, final, state)
        self._saves -= 1

    # --- events ---------------------------------------------------------------------------------------------------

    def _expect(self, reference: Any, what: str, handle: Callable[[Any], None]) -> None:
        self._pending[reference] = (what, handle)

    def _wait_for_event(self) -> None:
        timeout = self.config.cluster.call_timeout_s
        if not self._pending:
            raise RuntimeError(
                f"nothing is under way at step {self.version}, with {self.buffer.untrained} groups untrained "
                f"and workers at versions {self.ledger.running}: this is a defect of the loop"
            )
        done, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        if not done:
            waiting = "; ".join(what for what, _ in list(self._pending.values())[:5])
            raise TimeoutError(f"waited {timeout:g} s (cluster.call_timeout_s) and nothing finished of: {waiting}")
        what, handle = self._pending.pop(done[0])
        try:
            value = ray.get(done[0], timeout=timeout)
        except RayActorError as error:
            raise RuntimeError(f"an actor died during {what}: {error}") from error
        handle(value)

    def _worker_stats(self) -> list[WorkerStats]:
        return [self.session.call(w.stats.remote(), "a worker's counters") for w in self.session.workers]

    def _report(self, report: TrainReport, groups: list[ReadyGroup], ages: list[int]) -> None:
        now = time.monotonic()
        wall, self._step_began = now - self._step_began, now
        self._learner_busy_s += report.metrics["step_s"]
        results = [r for g in groups for r in g.results]
        reward = float(np.mean([r.total for r in results]))
        if self.result.mean_reward_first is None:
            self.result.mean_reward_first = reward
        self.result.mean_reward_last = reward
        sampled = sum(g.summary.tokens for g in groups)
        monitor = LogpDiff.merge([g.summary.monitor for g in groups])
        swaps, self._swaps = self._swaps, []
        values: dict[str, float | None] = {
            "reward/total": reward,
            **{
                f"reward/{name}": float(np.mean([r.components[name] for r in results]))
                for name in results[0].components
            },
            "reward/group_std": float(np.mean([np.std([r.total for r in g.results]) for g in groups])),
            "reward/failed_streams": float(sum(r.failed is not None for r in results)),
            **{f"train/{name}": value for name, value in report.metrics.items()},
            "age/mean": float(np.mean(ages)),
            "age/max": float(max(ages)),
            "rollout/tokens_per_s": sampled / wall,
            "rollout/log_tokens": float(sum(g.summary.log_tokens for g in groups)),
            "rollout/evicted_tokens": float(sum(g.summary.evicted_tokens for g in groups)),
            "rollout/group_s": float(np.mean([g.summary.seconds for g in groups])),
            "rollout/dropped_groups": float(self.result.dropped_groups),
            "buffer/ready": float(self.buffer.ready),
            "busy/learner": self._learner_busy_s / (now - self._began),
            "busy/workers": float(np.mean([s.busy_share for s in swaps])) if swaps else None,
            "swap/pause_s": max((s.pause_s for s in swaps), default=None),
            "swap/fetch_s": max((s.fetch_s for s in swaps), default=None),
            "mismatch/worker_max": monitor.max,
            "mismatch/worker_mean": monitor.mean,
            "mismatch/worker_tokens": float(monitor.tokens),
            "step/wall_s": wall,
        }
        self.tracker.metrics(values, report.step + 1)
        self.progress.step(
            "rl",
            self.version,
            self.config.algorithm.steps,
            {
                "reward": reward,
                "loss": values["train/loss"],
                "entropy": values["train/entropy"],
                "clip": values["train/clip_share"],
                "age": values["age/max"],
                "tok/s": values["rollout/tokens_per_s"],
            },
        )

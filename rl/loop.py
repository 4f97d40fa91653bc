"""The asynchronous RL loop: event-driven, no pause, bounded age.

The driver only moves references and small summaries. It waits for whichever comes first of: a group rolled
out, a group scored, an optimiser step, a worker's swap, a checkpoint, an evaluation's stream. Invariants: the age bound
of `rl.buffer`; the two live versions of `rl.versions`; every group admitted is trained, dropped by name, or left over at
the end; a group is in a checkpoint's `consumed` exactly if its weights have seen it.
`algorithm.mode=sync` is the same loop with the capacity of one step and no lag. `deterministic=true` also fixes which
worker gets which group and lets each worker run one group at a time, so that no batch depends on timing.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from conf.age import age_bound
from evals.best import named_best
from rewards.compose import RewardResult
from rl.algorithms.base import train_batch
from rl.algorithms.table import make_algorithm
from rl.buffer import GroupBuffer
from rl.idle import IdleWatch
from rl.metrics import StepClock, mean_reward, step_metrics
from rl.periodic_eval import PeriodicEvaluation
from rl.results import ReadyGroup, RLResult
from rl.versions import WeightLedger
from runtime.checkpointer import FINAL, Checkpointer
from runtime.cluster.events import Events
from runtime.context import StageContext
from runtime.mismatch_gate import Monitor
from runtime.stop import Requeue
from runtime.store.checkpoint import CheckpointState, promote, read_best, step_name
from runtime.store.journal import StepJournal, journal_path
from runtime.store.manifests import plain
from runtime.task_order import epochs, group_id
from streams.data.dataset import SkippedSample, at_row
from streams.log.mismatch import LogpDiff, OffToken
from streams.messages import (
    GroupSummary,
    RewardJob,
    RolloutTask,
    ScoreReport,
    SwapReport,
    TrainReport,
)
from streams.support.byte_cache import ByteBudgetCache
from streams.task import Reason, StreamTask


class RLLoop:
    """One RL stage over a running session whose actors hold the starting checkpoint (or the resumed one)."""

    def __init__(
        self, context: StageContext, tasks: tuple[StreamTask, ...], heldout: tuple[StreamTask, ...] = ()
    ) -> None:
        # The start could check eval.best against rows that were there; now the generated ones are, too.
        self.context, self.config, self.session = context, named_best(context.config, heldout), context.session
        self.progress, self.total = context.progress, context.steps
        state = context.resume
        self.buffer: GroupBuffer[ReadyGroup] = GroupBuffer(age_bound(self.config))
        self.result = RLResult.restore(state.counters) if state else RLResult()
        self.version = state.version if state else 0
        self.ledger = WeightLedger(len(self.session.workers), self.buffer.limits.lag, self.version)
        self.consumed = list(state.consumed) if state else []
        self.dropped = list(state.dropped) if state else []
        self.checkpoints = Checkpointer(context)
        self.monitor = Monitor(self.config)
        self.published_off: OffToken | None = None
        self.result.best = read_best(self.checkpoints.folder / "best", self.version)
        self.journal = StepJournal.open(journal_path(self.config.root, "rl"), self.version)
        self._idle = IdleWatch(self.config, (line.values for line in self.journal.of_kind("step")))
        self.events = Events(self.config.cluster.call_timeout_s, context.stop, self.session.explain_death)
        self.evaluation = PeriodicEvaluation(
            self.config,
            self.session,
            self.events,
            self.ledger,
            heldout,
            self.total,
            self.progress.say,
            self._evaluated,
            self._score_heldout,
            self.monitor,
        )
        self._source = epochs(tasks, self.config.seed, [*self.consumed, *self.dropped])
        self._done_before = len(self.consumed) + len(self.dropped)
        self._load = [0] * len(self.session.workers)
        self._per_worker = max(1, self.config.rollout.max_streams // self.config.algorithm.group_size)
        # References keep features alive in the object store: the budget bounds what a long dataset may pin there.
        self._features: ByteBudgetCache[Any] = ByteBudgetCache(self.config.data.cache_mb * 2**20)
        self._seen_tasks: set[str] = set()
        self._swaps: list[SwapReport] = []
        self._dropped_in_a_row = 0
        self._saving: set[int] = set()
        self._written: set[int] = {self.version} if state else set()
        self._before_s = self.result.seconds
        self._step_began = time.monotonic()
        self._learner_busy_s = 0.0
        self._training = False
        self._weights: Any = None

    def run(self) -> RLResult:
        """Train all optimiser steps of the stage, write the final checkpoint, report."""
        self.context.tracker.commit(self.journal.take(self.version))
        self._name_cut_off()
        if self.version and self.evaluation.due(self.version) and not self.journal.has("eval", self.version):
            self.evaluation.begin(self.version)
        while self.version < self.total or self._saving or self.evaluation.active:
            if self.context.stop.requested:
                self._stop()
            self.evaluation.pump()
            self._admit()
            self._train()
            self.events.wait()
        self._save(final=True)
        while self._saving or self.ledger.fetching:
            self.events.wait()
        score = self._score_published()
        self.result.published, self.result.published_by_kind = score.diff, score.by_kind
        self.published_off = score.off
        for worker in self.session.workers:
            stats = self.session.call(worker.stats.remote(), "a worker's counters")
            self.result.clips_encoded += stats.clips_encoded
        self.result.distinct_clips = len(self._seen_tasks)
        self.result.seconds = self._before_s + self.context.seconds()
        return self.result

    def _stop(self) -> None:
        """Somebody asked the run to end: finish the step under way, write a checkpoint, say so."""
        while self._training:
            self.events.wait()
        if self.version not in self._saving | self._written and self.version:
            self._save()
        while self._saving:
            self.events.wait()
        raise Requeue(f"rl: stopped at step {self.version}, checkpoint {self.context.stop.last_checkpoint}")

    def _score_published(self) -> ScoreReport:
        """One group per worker on the weights it swapped in, scored by the learner that published them.

        This is what shows that publishing works: a swap that copied nothing, or named the wrong version, fails here.
        """
        payloads = []
        for i, worker in enumerate(self.session.workers):
            _, task = next(self._source)
            request = self._request(task, f"published-{i}/{task.id}")
            summary, payload = worker.rollout.options(num_returns=2).remote(request)
            if self.session.call(summary, f"a group on the published weights of worker {i}").failed is None:
                payloads.append(payload)
        report = self.session.call(self.session.learners.score(tuple(payloads)), "the published weights' scores")
        return report

    def _request(self, task: StreamTask, group: str) -> RolloutTask:
        return RolloutTask(
            group=group,
            task=task,
            plan=self.config.data.plan_of(task),
            streams=self.config.algorithm.group_size,
            temperature=self.config.rollout.temperature,
            features=self._features.get(task.id),
        )

    # --- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        wanted = self.total * self.config.algorithm.groups_per_step
        while self.buffer.may_admit() and len(self.consumed) + self.buffer.untrained < wanted:
            worker = self._fixed_worker() if self.config.deterministic else self._free_worker()
            if worker is None:
                return
            self._dispatch(worker)

    def _free_worker(self) -> int | None:
        """The worker with the fewest groups among those that may have another."""
        free = [
            w
            for w in range(len(self._load))
            if self._load[w] < self._per_worker and self.ledger.may_work(w, self.version)
        ]
        return min(free, key=lambda w: self._load[w], default=None)

    def _fixed_worker(self) -> int | None:
        """Group number n belongs to worker n mod W, and waits until that worker has nothing else to do."""
        worker = (self._done_before + self.buffer.admitted) % len(self._load)
        idle = not self._load[worker] and not self.evaluation.active
        return worker if idle and self.ledger.may_work(worker, self.version) else None

    def _dispatch(self, worker: int) -> None:
        epoch, task = next(self._source)
        ticket = self.buffer.admit()
        request = self._request(task, group_id(epoch, task))
        self._load[worker] += 1
        self._seen_tasks.add(task.id)
        summary, payload = self.session.workers[worker].rollout.options(num_returns=2).remote(request)
        self.events.expect(
            summary,
            f"group {request.group} on rollout worker {worker}",
            lambda value: self._rolled_out(value, payload, request, ticket, worker),
        )

    def _rolled_out(self, summary: GroupSummary, payload: Any, request: RolloutTask, ticket: int, worker: int) -> None:
        task = request.task
        self._load[worker] -= 1
        self.monitor.observe(f"rollout worker {worker}", summary.monitor, summary.off)
        if summary.failed is not None:
            self._drop(summary, ticket, task)
            return
        if summary.features is not None:
            self._features.put(task.id, summary.features, summary.feature_bytes)
        job = RewardJob(summary.group, task, request.plan, summary.turns)
        self.events.expect(
            self.session.scorer.score.remote((job,)),
            f"the scores of group {summary.group}",
            lambda results: self._scored(results[0], summary, payload, ticket),
        )

    def _drop(self, summary: GroupSummary, ticket: int, task: StreamTask) -> None:
        self.result.skipped.append(SkippedSample.failure(task, str(summary.failed)))
        self.result.dropped_clip_seconds += summary.clip_seconds
        self._dropped(summary.group, ticket, f"{summary.failed}{at_row(task)}", mend="the data or the workers")

    def _dropped(self, group: str, ticket: int, reason: str, mend: str) -> None:
        """A group that cannot be trained is dropped and named; when no other comes any more, the run must not go on."""
        self.buffer.drop(ticket)
        self.dropped.append(group)
        self.result.dropped_groups += 1
        self.progress.say(f"rl: dropped group {group}: {reason}")
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row > max(50, 2 * self.config.algorithm.groups_in_flight):
            raise RuntimeError(
                f"{self._dropped_in_a_row} groups in a row were dropped; the last: {reason}. "
                f"Nothing is being learned: mend {mend}"
            )

    def _scored(
        self,
        results: tuple[RewardResult, ...],
        summary: GroupSummary,
        payload: Any,
        ticket: int,
    ) -> None:
        for i, result in enumerate(results):
            if result.failed is not None:
                name = f"stream {summary.group}/{i}"
                self.result.skipped.append(SkippedSample(name, f"reward: {result.failed}", Reason.REWARD))
        if all(result.failed is not None for result in results):
            # The reward code of a user: it may fail for one task, or for every one.
            self._dropped(summary.group, ticket, f"every reward failed: {results[0].failed}", mend="the reward")
            return
        self._dropped_in_a_row = 0
        self.buffer.fulfil(ticket, ReadyGroup(summary, payload, results))

    # --- training -------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        if self._training or self.version >= self.total or not self.ledger.may_publish():
            return
        if self.config.algorithm.mode == "sync" and self.evaluation.active:
            return  # until the learner has scored its logs, at the version that they were sampled with
        groups = self.buffer.next_batch()
        if groups is None:
            return
        ages = [self.buffer.check_age(self.version, g.summary.oldest_version, g.summary.group) for g in groups]
        batch = train_batch(self.version, make_algorithm(self.config.algorithm), groups)
        self._training = True
        report, weights = self.session.learners.train(batch)
        self.events.expect(
            report,
            f"optimiser step {self.version + 1}",
            lambda value: self._trained(value, weights, groups, ages),
        )

    def _trained(self, report: TrainReport, weights: Any, groups: list[ReadyGroup], ages: list[int]) -> None:
        self._training = False
        # Before the new weights reach anyone, or a checkpoint.
        self.monitor.observe("learner, on training streams of its own version", report.age0, report.off)
        self.version = report.version
        self.buffer.trained()
        self.consumed += [g.summary.group for g in groups]
        self.result.max_age = max(self.result.max_age, *ages)
        for group in groups:
            self.result.versions_seen.update(group.summary.versions)
        self.result.monitor = LogpDiff.merge([self.result.monitor, *(g.summary.monitor for g in groups)])
        self.result.age0 = LogpDiff.merge([self.result.age0, report.age0])
        self.result.steps = self.version
        self.result.sampled_tokens += sum(g.summary.tokens for g in groups)
        self._publish(report.version, weights)
        self._report(report, groups, ages)
        evaluate = self.evaluation.due(self.version)
        if self.checkpoints.due(self.version, self.total) or (evaluate and self.version < self.total):
            self._save()
        if evaluate:
            self.evaluation.begin(self.version)

    def _publish(self, version: int, weights: Any) -> None:
        self.ledger.publish(version)
        self._weights = weights
        self._start_fetches()

    def _start_fetches(self) -> None:
        for worker in self.ledger.next_fetches():
            self.events.expect(
                self.session.workers[worker].update_weights.remote([self._weights]),
                f"rollout worker {worker} to swap to version {self.ledger.published}",
                self._swapped,
            )

    def _swapped(self, report: SwapReport) -> None:
        self.ledger.swapped(report.worker, report.version)
        self._swaps.append(report)
        self._start_fetches()

    # --- checkpoints and evaluation -----------------------------------------------------------------------------------

    def _save(self, *, final: bool = False) -> None:
        step = self.version
        self.result.seconds = self._before_s + self.context.seconds()
        state = CheckpointState(
            "rl",
            self.version,
            step,
            tuple(self.consumed),
            tuple(self.dropped),
            self.config.algorithm.group_size,
            plain(asdict(self.result)),
        )
        try:
            reference = self.checkpoints.save(state, final=final)
        except OSError as error:
            self.checkpoints.save_failed(error, step, final=final)
            return
        self._saving.add(step)
        self.events.expect(
            reference,
            f"the checkpoint of step {step}",
            lambda path: self._saved(path, step),
            lambda error: self._save_failed(error, step, final),
        )

    def _saved(self, path: str, step: int) -> None:
        self._saving.discard(step)
        self._written.add(step)
        self._promote(step)
        self.checkpoints.saved(path, protect=self._awaiting_evaluation())
        self.context.tracker.commit(self.journal.take(step))

    def _save_failed(self, error: Exception, step: int, final: bool) -> None:
        self._saving.discard(step)
        self.checkpoints.save_failed(error, step, final=final)

    def _score_heldout(self, summary: GroupSummary, payload: Any) -> Any | None:
        """A reference to the learner's scores of a held-out stream; None if it stands, or is going to, at other weights."""
        if self._training or summary.versions != (self.version,):
            return None
        return self.session.learners.score((payload,), (summary.log_tokens,))

    def _evaluated(self, version: int, values: dict[str, float | None]) -> None:
        shown = ", ".join(
            f"{key.removeprefix('eval/')} {value:.3f}"
            for key, value in values.items()
            if value is not None and key.startswith("eval/")
        )
        self.progress.say(f"eval at step {version}: {shown}")
        self.journal.append(version, values, kind="eval")
        self._promote(version)
        self.context.tracker.commit(self.journal.take(max(self._written, default=0)))

    def _name_cut_off(self) -> None:
        """Evaluations that ended with the attempt before: their weights are behind, the workers hold newer ones."""
        for line in self.journal.of_kind("step"):
            if line.step < self.version and self.evaluation.due(line.step) and not self.journal.has("eval", line.step):
                self.progress.say(f"rl: the evaluation of step {line.step} was cut off by the end of the run: left out")

    def _awaiting_evaluation(self) -> set[str]:
        """Checkpoints whose evaluation is still to come: one of them may be the best."""
        due = {step for step in self._written if self.evaluation.due(step)}
        return {step_name(step) for step in due if not self.journal.has("eval", step)}

    def _promote(self, step: int) -> None:
        """Keep the export of `step` as `best`, if both it and its evaluation are there and it beats the best so far."""
        metric = f"eval/{self.config.eval.best}"
        value = next((line.values.get(metric) for line in self.journal.of_kind("eval") if line.step == step), None)
        if step not in self._written or value is None:
            return
        if self.result.best and self.result.best["value"] >= value:
            return
        final = step == self.total
        source = self.checkpoints.folder / (FINAL if final else step_name(step))
        if not source.is_dir():  # the stage was resumed from a checkpoint of another run
            return
        best = {"step": step, "metric": self.config.eval.best, "value": value}
        try:
            promote(source, self.checkpoints.folder / "best", best)
        except OSError as error:  # a full disk costs this copy, not the run
            self.progress.say(
                f"rl: step {step} is the best so far but could not be kept as checkpoints/rl/best: {error}"
            )
        else:
            self.result.best = best

    def _report(self, report: TrainReport, groups: list[ReadyGroup], ages: list[int]) -> None:
        now = time.monotonic()
        wall, self._step_began = now - self._step_began, now
        self._learner_busy_s += report.metrics["step_s"]
        if self.result.mean_reward_first is None:
            self.result.mean_reward_first = mean_reward(groups)
        self.result.mean_reward_last = mean_reward(groups)
        swaps, self._swaps = self._swaps, []
        clock = StepClock(wall, self._learner_busy_s / self.context.seconds())
        values = step_metrics(report, groups, ages, swaps, clock, self.buffer.ready, self.result.dropped_groups)
        self.journal.append(self.version, values, tuple(g.summary.group for g in groups))
        if said := self._idle.see(values):
            self.progress.say(said)
        self.progress.step(
            "rl",
            self.version,
            self.total,
            {
                "reward": values["reward/total"],
                "loss": values["train/loss"],
                "entropy": values["train/entropy"],
                "clip": values["train/clip_share"],
                "age": values["age/max"],
                "tok/s": values["rollout/tokens_per_s"],
            },
        )

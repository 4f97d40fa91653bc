"""The asynchronous RL loop: events in, calls out; no pause, bounded age.

The driver moves only references and small summaries. It waits for whichever of these comes first: a group rolled out, a
group scored, an optimiser step, a worker's swap, a checkpoint, a stream of an evaluation. `algorithm.mode=sync` is the
same loop with a capacity of one step and no lag. `deterministic=true` also fixes which worker gets which group, and
lets each worker run one group at a time, so that no batch depends on timing.

Invariants:
* no sample is older than the bound of `rl.groups.buffer`;
* at most two published versions are alive (`rl.versions`);
* every admitted group is trained, dropped by name, or left over at the end, whatever workers and scorers die meanwhile;
* a stage that ends early (`algorithm.stop_when`) waits for what is under way: the next stage finds idle workers;
* weights that the mismatch gate refuses reach no worker and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from conf.age import age_bound
from rewards.compose import RewardResult
from rl.algorithms.base import train_batch
from rl.algorithms.table import make_algorithm
from rl.evaluated_stage import EvaluatedStage
from rl.groups import kept
from rl.groups.buffer import GroupBuffer
from rl.groups.dispatch import KEPT, Assignment, Dispatcher
from rl.groups.spread import teaches_nothing
from rl.periodic_eval import PeriodicEvaluation
from rl.results import ReadyGroup, RLResult
from rl.step_report import StepReport
from rl.versions import VersionLedger
from rl.workers import PublishedGroups, Workers
from runtime.cluster.events import MOST_DEATHS, first_line, lost_with_an_actor
from runtime.context import StageContext
from runtime.mismatch_gate import MismatchGate
from runtime.task_order import epochs
from streams.data.dataset import Reason, SkippedSample, at_row
from streams.log.mismatch import OffToken
from streams.messages import GroupSummary, RewardJob, ScoreReport, TrainReport
from streams.task import StreamTask


class RLLoop:
    """One RL stage over a running session whose actors have loaded the starting checkpoint, or the resumed one."""

    def __init__(self, context: StageContext, tasks: Sequence[StreamTask], heldout: Sequence[StreamTask] = ()) -> None:
        config = self.config = context.config
        self.session = context.session
        self.stage = EvaluatedStage(
            context,
            tasks,
            heldout,
            patience=max(50, 2 * config.algorithm.groups_in_flight),
            group_size=config.algorithm.group_size,
        )
        self.version = self.stage.began_at
        self.result = RLResult.restore(context.resume.counters) if context.resume else RLResult()
        self.buffer: GroupBuffer[ReadyGroup] = GroupBuffer(age_bound(config))
        ledger = VersionLedger(config.rollout.workers, self.buffer.limits.lag, self.version)
        done, suspects = self.stage.done, self.stage.revival.suspects
        self.kept = kept.read(context.resumed) if context.resumed else {}
        if self.kept:
            context.progress.say(f"rl: {len(self.kept)} finished groups of the checkpoint are not rolled out again")
        source = epochs(tasks, config.seed, done)
        self.dispatch = Dispatcher(config, self.buffer, ledger, source, len(done), suspects, self.kept)
        if config.checkpoint.keep_rollouts:
            self.stage.checkpoints.beside = kept.Keeper(config.checkpoint, context.stop, self.buffer)
        self.gate = MismatchGate(config)
        self.workers = Workers(self.session, self.stage.events, ledger, self.gate, self.stage.revival)
        self.stage.revival.watch(self.dispatch.reissue, self._worker_back)
        self.evaluation = PeriodicEvaluation(self.stage, self.workers, self)
        self.report = StepReport(context, [line.values for line in self.stage.journal.steps()])
        self.total = self.report.last_step(self.version, self.result)
        self.published_off: OffToken | None = None
        self._training = False

    def run(self) -> RLResult:
        """Train all optimiser steps of the stage and write the final checkpoint.

        Raises Requeue if the run is asked to stop; RuntimeError or TimeoutError if an actor dies or does not reply, if
        too many groups in a row are dropped, or if learner and engine disagree.
        """
        stage, wait = self.stage, self.stage.events.wait
        stage.chart(self.version)
        stage.catch_up()
        if stage.evaluation_missing():
            self.evaluation.begin(self.version)
        # Of a stage that ends early some groups are still under way.
        while (
            self.version < self.total
            or stage.checkpoints.busy
            or self.evaluation.active
            or self.buffer.untrained > self.buffer.ready
        ):
            if stage.context.stop.requested:
                # The step under way is finished first: the checkpoint must hold what the learner has.
                while self._training:
                    wait()
                stage.leave(self.version, self._account().counters())
            self.evaluation.pump()
            self._admit()
            self._train()
            wait()
        stage.finish(self.version, self._account().counters())
        # `_check_published` is about the last version: every worker must have swapped to it.
        while not self.workers.ledger.settled or stage.revival.coming:
            wait()
        self._check_published()
        for stats in self.session.crew.of_living(lambda worker: worker.stats.remote(), "say its counters"):
            self.result.clips_encoded += 0 if stats is None else stats.clips_encoded
        self.result.distinct_clips = len(self.dispatch.clips)
        return self._account()

    def _check_published(self) -> None:
        """Have each worker roll out a group on the weights it swapped in, and the learner that published them score it."""
        for _ in range(MOST_DEATHS):
            groups = PublishedGroups(self.workers, self.version, self.dispatch.extra, self.stage.revival.expected)
            payloads = groups.payloads(self.stage.events.wait)
            score = self.session.score_logs(payloads, "the published weights' scores")
            # The next stage must find every worker there.
            while self.stage.revival.coming:
                self.stage.events.wait()
            if score is not None:
                break
        else:
            raise RuntimeError(f"groups on the published weights were lost {MOST_DEATHS} times with workers that died")
        self.result.published, self.result.published_by_kind = score.diff, score.by_kind
        self.published_off = score.off

    # --- groups: admitted, rolled out, scored ---------------------------------------------------------------------

    def _admit(self) -> None:
        if self.config.deterministic and self.evaluation.active:
            return  # a worker runs either a group or an evaluation's streams
        left = self.total * self.config.algorithm.groups_per_step - len(self.stage.consumed)
        while assignment := self.dispatch.next(self.version, left):
            why = self.workers.suspects.condemned(assignment.group)
            if assignment.life == KEPT:
                self._take(assignment)
            elif why is None:
                self._send(assignment)
            else:
                failed = GroupSummary(assignment.group, assignment.task.id, assignment.worker, failed=why)
                self._rolled_out(failed, None, assignment)

    def _take(self, assignment: Assignment) -> None:
        """Make a group ready that the checkpoint has kept; have it rolled out again if it cannot be read."""
        group = self.kept.pop(assignment.group)
        limits = self.buffer.limits
        trained_at = self.version + (self.buffer.untrained - 1) // limits.batch
        if trained_at - group.summary.oldest_version > limits.bound:
            # Settings or rows have changed since it was kept: in its old place it would have been young enough.
            self.dispatch.again(assignment)
            return
        missing, payload = kept.fetch(group)

        def fetched(why: str | None) -> None:
            if why is None:
                self.stage.found_good()
                self.dispatch.fulfil(assignment, group.ready(payload))
                return
            self.stage.context.progress.say(f"rl: group {group.summary.group} is rolled out again: {why}")
            self.dispatch.again(assignment)

        name = f"group {group.summary.group} of the checkpoint"
        self.stage.events.expect(missing, name, fetched, lambda error: fetched(first_line(error)))

    def _send(self, assignment: Assignment) -> None:
        self.workers.roll_out(
            assignment.worker,
            self.dispatch.request(assignment),
            f"group {assignment.group}",
            lambda summary, payload: self._rolled_out(summary, payload, assignment),
        )

    def _rolled_out(self, summary: GroupSummary, payload: Any, assignment: Assignment) -> None:
        if not self.dispatch.returned(assignment, summary):
            return
        task = assignment.task
        if summary.failed is not None and assignment.features is not None:
            # What it was given may have died with whoever made it: the worker makes its own.
            self.dispatch.again(assignment)
            return
        if summary.failed is not None:
            self.result.skipped.append(SkippedSample.failure(task, str(summary.failed)))
            self.result.dropped_clip_seconds += summary.clip_seconds
            self._drop(assignment, f"{summary.failed}{at_row(task)}", mend="the data or the workers")
            return
        job = RewardJob(summary.group, task, assignment.plan, summary.turns)
        self.workers.score(
            (job,), f"group {summary.group}", lambda scores: self._scored(scores[0], summary, payload, assignment)
        )

    def _scored(
        self, results: tuple[RewardResult, ...], summary: GroupSummary, payload: Any, assignment: Assignment
    ) -> None:
        if not self.dispatch.is_latest(assignment):
            return
        for i, result in enumerate(results):
            if result.failed is not None:
                name = f"stream {summary.group}/{i}"
                self.result.skipped.append(
                    SkippedSample(name, f"reward: {result.failed} ({_weights(summary)})", Reason.REWARD)
                )
        if all(result.failed is not None for result in results):
            # Rewards may be a user's code, which may fail for one task or for all of them.
            self._drop(assignment, f"every reward failed: {results[0].failed} ({_weights(summary)})", mend="the reward")
            return
        self.stage.found_good()
        group = ReadyGroup(summary, payload, results)
        settings = self.config.algorithm
        if self.result.given_up.may_take(settings) and teaches_nothing(make_algorithm(settings).advantages(group)):
            self.dispatch.drop(assignment)
            self.stage.dropped.add(assignment.group)
            self.result.given_up.add(assignment.task.category, assignment.plan.turns, summary.clip_seconds)
            return
        self.dispatch.fulfil(assignment, group)

    def _drop(self, assignment: Assignment, reason: str, mend: str) -> None:
        """Drop a group that cannot be trained, by name. Raises RuntimeError after too many of them in a row.

        mend: what has to be fixed, for that error.
        """
        self.dispatch.drop(assignment)
        self.result.dropped_groups += 1
        self.stage.drop(
            assignment.group,
            f"dropped group {assignment.group}: {reason}",
            f"{self.stage.patience + 1} groups in a row were dropped; the last: {reason}. "
            f"Nothing is being learned: fix {mend}",
        )

    # --- optimiser steps ------------------------------------------------------------------------------------------

    def _train(self) -> None:
        if self._training or self.stage.checkpoints.holds or self.version >= self.total:
            return
        if not self.workers.ledger.may_publish():
            return
        if self.config.algorithm.mode == "sync" and self.evaluation.active:
            return  # the learner must first score the evaluation's logs, at the version that sampled them
        groups = self.buffer.next_batch()
        if groups is None:
            return
        ages = [self.buffer.check_age(self.version, g.summary.oldest_version, g.summary.group) for g in groups]
        self._training = True
        report, weights = self.session.learners.train(
            train_batch(self.version, make_algorithm(self.config.algorithm), groups)
        )
        self.stage.events.expect(
            report,
            f"optimiser step {self.version + 1}",
            lambda value: self._trained(value, weights, groups, ages),
            self._untrained,
        )

    def _untrained(self, error: Exception) -> None:
        """Have a batch rolled out again whose media were lost before the learner had fetched them; raise any other error."""
        self.session.learners.check_unfetched(error)
        self._training = False
        tickets = self.dispatch.reissue_batch()
        self.stage.context.progress.say(
            f"rl: the media of step {self.version + 1} were lost with a worker: its {len(tickets)} groups are rolled out again"
        )

    def _trained(self, report: TrainReport, weights: Any, groups: list[ReadyGroup], ages: list[int]) -> None:
        self._training = False
        # Judged before the new weights reach a worker or a checkpoint.
        self.gate.observe("learner, on training streams of its own version", report.age0, report.off)
        self.version = report.version
        self.buffer.trained()
        self.workers.publish(report.version, weights)
        swaps = self.workers.take_swaps()
        values = self.report.metrics(report, groups, ages, swaps, self.buffer.ready, self.result)
        self.result.count_step(report, groups, ages, values["reward/total"])
        self.total = self.report.last_step(self.version, self.result)
        self.stage.trained(self.version, tuple(g.summary.group for g in groups), values)
        self.report.say(self.version, values)
        evaluate = self.stage.evaluation_due(self.version)
        if self.stage.checkpoints.due(self.version) or (evaluate and self.version < self.total):
            self.stage.save(self.version, self._account().counters())
        if evaluate:
            self.evaluation.begin(self.version)

    def score_log(self, summary: GroupSummary, payload: Any, handle: Callable[[ScoreReport | None], None]) -> bool:
        """Have the learner score a held-out stream for `handle`, which gets None if its media are lost.

        Returns False, and does nothing, if the learner is at another version than the stream's, or about to be.
        """
        if self._training or summary.versions != (self.version,):
            return False

        def scored(report: ScoreReport) -> None:
            self.gate.observe("learner, on held-out logs", report.diff, report.off)
            handle(report)

        def failed(error: Exception) -> None:
            if not lost_with_an_actor(error):
                raise error
            handle(None)

        self.stage.events.expect(
            self.session.learners.score((payload,), (summary.log_tokens,)),
            f"the learner's scores of {summary.group}",
            scored,
            failed,
        )
        return True

    # --- workers that come and go ---------------------------------------------------------------------------------

    def _worker_back(self, worker: int, version: int) -> None:
        self.dispatch.restored(worker, version)
        self.workers.catch_up()

    def _account(self) -> RLResult:
        """Return the result so far, with its time, best checkpoint, and deaths."""
        self.result.deaths = self.stage.deaths
        self.result.seconds, self.result.best = self.stage.seconds, self.stage.best
        return self.result


def _weights(summary: GroupSummary) -> str:
    """Return which weights have sampled a group, in words."""
    several = len(summary.versions) > 1
    return f"weights version{'s' if several else ''} {', '.join(map(str, summary.versions))}"

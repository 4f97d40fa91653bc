"""The cold start: demonstrations are laid out on the rollout workers and trained on by the learner.

Workers read clips and write logs ahead of the learner; frames travel with the log by object reference and
the learner encodes them, so the vision tower can train. Invariants: a demonstration that cannot be laid out costs that
sample, is named, and the batch is filled with the next one; the order of samples depends on the seed alone, and a
resumed stage goes on with the first sample that its checkpoint does not name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from conf.schema import RunConfig
from learner.messages import TrainBatch, TrainGroup
from runtime.checkpointer import Checkpointer
from runtime.context import StageContext
from runtime.stop import Requeue
from runtime.store.checkpoint import CheckpointState
from runtime.store.journal import StepJournal, journal_path
from runtime.task_order import epochs, group_id
from sft.demonstrations import script_for
from streams.data.dataset import SkippedSample, at_row
from streams.messages import GroupSummary, ScriptTask, TrainReport
from streams.task import StreamTask

AHEAD = 2
"""Batches laid out ahead of the learner."""


@dataclass
class SftResult:
    """What the cold start reports. seconds: of all attempts, up to the checkpoints that they went on from."""

    steps: int = 0
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    skipped: list[SkippedSample] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def restore(cls, counters: dict[str, Any]) -> SftResult:
        return cls(**(counters | {"skipped": [SkippedSample(**s) for s in counters.get("skipped", ())]}))


class SftLoop:
    """One cold start over a running session whose learner holds the starting weights (or the resumed state)."""

    def __init__(self, context: StageContext, tasks: tuple[StreamTask, ...]) -> None:
        self.context, self.config, self.session = context, context.config, context.session
        self.checkpoints = Checkpointer(context)
        state = context.resume
        self.result = SftResult.restore(state.counters) if state else SftResult()
        self.consumed = list(state.consumed) if state else []
        self.dropped = list(state.dropped) if state else []
        self.journal = StepJournal.open(journal_path(self.config.root, "sft"), self.result.steps)
        self._tasks = tasks
        self._samples = self._lay_out()
        self._saving: list[tuple[Any, int]] = []
        self._before = self.result.seconds

    def run(self) -> SftResult:
        """All optimiser steps of the stage, then the checkpoint `checkpoints/sft/final`."""
        context, total = self.context, self.context.steps
        context.tracker.commit(self.journal.take(self.result.steps))
        pending: tuple[Any, tuple[str, ...]] | None = None
        while self.result.steps + (pending is not None) < total:
            if context.stop.requested:
                self._collect(pending)
                self._stop()
            groups = [next(self._samples) for _ in range(self.config.sft.batch)]
            step = self.result.steps + (pending is not None)
            members = tuple(TrainGroup(s.group, payload, tokens=s.log_tokens) for s, payload in groups)
            batch = TrainBatch(step, self.config.sft.loss, members, publish=False)
            # Collect the step before only now: the learner never waits for the driver.
            self._collect(pending)
            pending = (
                self.session.learners.train(batch)[0],
                tuple(summary.group for summary, _ in groups),
            )
            if self.checkpoints.due(step + 1, total):
                self._collect(pending)
                pending = None
                self._save()
        self._collect(pending)
        self._save(final=True)
        self._finish_saves(0)
        return self.result

    def _lay_out(self) -> Iterator[tuple[GroupSummary, Any]]:
        """Laid-out demonstrations for ever, in the order of the epochs, some batches ahead."""
        config, session = self.config, self.session
        source = _scripts(config, self._tasks, frozenset(self.consumed) | frozenset(self.dropped))
        waiting: list[tuple[ScriptTask, Any, Any]] = []
        refused = 0
        turn = 0
        while True:
            while len(waiting) < AHEAD * config.sft.batch:
                script = next(source)
                worker = session.workers[turn % len(session.workers)]
                turn += 1
                waiting.append((script, *worker.script.options(num_returns=2).remote(script)))
            script, summary_ref, payload = waiting.pop(0)
            summary: GroupSummary = session.call(summary_ref, f"the demonstration of {script.group}")
            if summary.failed is None:
                refused = 0
                yield summary, payload
                continue
            refused += 1
            self.dropped.append(script.group)
            self.result.skipped.append(SkippedSample.failure(script.task, summary.failed))
            self.context.progress.say(f"sft: skipped {script.group}: {summary.failed}{at_row(script.task)}")
            if refused > len(self._tasks):
                raise RuntimeError(f"no demonstration could be laid out; the last: {summary.failed}")

    def _collect(self, pending: tuple[Any, tuple[str, ...]] | None) -> None:
        """Wait for the step under way and take its report."""
        if pending is None:
            return
        reference, groups = pending
        report: TrainReport = self.session.call(reference, f"cold-start step {self.result.steps + 1}")
        self.result.steps += 1
        self.consumed += groups
        loss = report.metrics["loss"]
        if self.result.steps == 1:
            self.result.first_loss = loss
        self.result.last_loss = loss
        self.journal.append(self.result.steps, {f"sft/{name}": value for name, value in report.metrics.items()}, groups)
        self.context.progress.step(
            "sft", self.result.steps, self.context.steps, {"loss": loss, "entropy": report.metrics["entropy"]}
        )
        self._finish_saves(None)

    def _save(self, *, final: bool = False) -> None:
        step = self.result.steps
        self.result.seconds = self._before + self.context.seconds()
        state = CheckpointState(
            "sft", step, step, tuple(self.consumed), tuple(self.dropped), counters=asdict(self.result)
        )
        try:
            self._saving.append((self.checkpoints.save(state, final=final), step))
        except OSError as error:
            self.checkpoints.save_failed(error, step, final=final)

    def _finish_saves(self, timeout_s: float | None) -> None:
        """Take note of checkpoints that are complete; 0 waits for all of them (as long as any call may take)."""
        for reference, step in list(self._saving):
            if timeout_s is None and not ray.wait([reference], timeout=0)[0]:
                return
            final = step == self.context.steps
            self._saving.remove((reference, step))
            try:
                path = self.session.call(reference, f"the cold start's checkpoint of step {step}")
            except (ray.exceptions.RayTaskError, OSError) as error:
                self.checkpoints.save_failed(error, step, final=final)
                continue
            self.checkpoints.saved(path)
            self.context.tracker.commit(self.journal.take(step))

    def _stop(self) -> None:
        if self.checkpoints.last_step != self.result.steps:
            self._save()
        self._finish_saves(0)
        raise Requeue(f"sft: stopped at step {self.result.steps}, checkpoint {self.context.stop.last_checkpoint}")


def _scripts(config: RunConfig, tasks: tuple[StreamTask, ...], done: frozenset[str]) -> Iterator[ScriptTask]:
    for epoch, task in epochs(tasks, config.seed, done):
        plan = config.data.plan_of(task)
        script = script_for(task, plan, config.sft, seed=config.seed, epoch=epoch)
        yield ScriptTask(group_id(epoch, task), task, plan, script)

"""The cold start: rollout workers lay demonstrations out as logs, and the learner trains on them.

Workers read clips and write logs ahead of the learner. Frames travel with the log by object reference, and the learner
encodes them, so the vision tower can train.

Invariants:
* a demonstration that cannot be laid out is skipped and named, and the next one takes its place in the batch;
* the order of samples depends on the seed alone;
* a resumed stage continues with the first sample that its checkpoint does not name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conf.schema import RunConfig
from learner.messages import TrainBatch, TrainGroup
from runtime.context import StageContext
from runtime.task_order import epochs, group_id
from runtime.training_stage import TrainingStage
from sft.demonstrations import script_for
from sft.queue import DemonstrationQueue, LaidOut
from streams.data.dataset import SkippedSample, at_row
from streams.messages import ScriptTask, TrainReport
from streams.task import StreamTask

AHEAD = 2
"""Batches laid out ahead of the learner."""


@dataclass
class SftResult:
    """What the cold start reports.

    Attributes:
        seconds: time of all attempts, up to the checkpoints that they continued from.
        deaths: processes that died and were replaced, by the actor's name.
    """

    steps: int = 0
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    skipped: list[SkippedSample] = field(default_factory=list)
    seconds: float = 0.0
    deaths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def restore(cls, counters: dict[str, Any]) -> SftResult:
        """Return the result that a checkpoint's state has as JSON."""
        return cls(**(counters | {"skipped": [SkippedSample(**s) for s in counters.get("skipped", ())]}))


class SftLoop:
    """One cold start over a running session whose learner has loaded the starting weights, or the resumed state."""

    def __init__(self, context: StageContext, tasks: Sequence[StreamTask]) -> None:
        self.config, self.session, self.total = context.config, context.session, context.steps
        self.stage = TrainingStage(context, tasks, patience=len(tasks))
        self.result = SftResult.restore(context.resume.counters) if context.resume else SftResult()
        self.demonstrations = DemonstrationQueue(
            self.stage,
            _scripts(self.config, tasks, self.stage.done),
            AHEAD * self.config.sft.batch,
            self._refused,
        )
        self._training = False

    def run(self) -> SftResult:
        """Run all optimiser steps of the stage, then write `checkpoints/sft/final`. Raises Requeue if asked to stop."""
        stage, wait = self.stage, self.stage.events.wait
        stage.chart(self.result.steps)
        while self.result.steps < self.total:
            if not stage.context.stop.requested:
                self._train()
            elif not self._training:
                stage.leave(self.result.steps, self._counters())
            # A stop lets the step under way finish: if that was the last one, the stage is complete.
            wait()
        stage.finish(self.result.steps, self._counters())
        self.demonstrations.clear()
        return self.result

    def _train(self) -> None:
        self.demonstrations.fill()
        if self._training or self.stage.checkpoints.holds:
            return
        taken = self.demonstrations.take(self.config.sft.batch)
        if taken is None:
            return
        self._training = True
        report, _ = self.session.learners.train(_train_batch(self.config, self.result.steps, taken))
        groups = tuple(sample.group for sample in taken)
        self.stage.events.expect(
            report,
            f"cold-start step {self.result.steps + 1}",
            lambda value: self._trained(value, groups),
            self._untrained,
        )

    def _untrained(self, error: Exception) -> None:
        """Have a batch laid out again whose media were lost before the learner had fetched them; raise any other error."""
        self.session.learners.check_unfetched(error)
        self._training = False
        count = self.demonstrations.take_back()
        self.stage.context.progress.say(
            f"sft: the media of step {self.result.steps + 1} were lost with a worker: its {count} samples are laid out again"
        )

    def _trained(self, report: TrainReport, groups: tuple[str, ...]) -> None:
        self._training = False
        self.demonstrations.trained()
        self.result.steps += 1
        loss = report.metrics["loss"]
        if self.result.steps == 1:
            self.result.first_loss = loss
        self.result.last_loss = loss
        values: dict[str, float | None] = {f"sft/{name}": value for name, value in report.metrics.items()}
        self.stage.trained(self.result.steps, groups, values)
        self.stage.context.progress.step(
            "sft", self.result.steps, self.total, {"loss": loss, "entropy": report.metrics["entropy"]}
        )
        if self.stage.checkpoints.due(self.result.steps):
            self.stage.save(self.result.steps, self._counters())

    def _refused(self, script: ScriptTask, reason: str) -> None:
        self.result.skipped.append(SkippedSample.failure(script.task, reason))
        self.stage.drop(
            script.group,
            f"skipped {script.group}: {reason}{at_row(script.task)}",
            f"no demonstration could be laid out; the last: {reason}",
        )

    def _counters(self) -> dict[str, Any]:
        """Return the result so far, as checkpoints store it."""
        self.result.seconds, self.result.deaths = self.stage.seconds, self.stage.deaths
        return asdict(self.result)


def _train_batch(config: RunConfig, step: int, samples: list[LaidOut]) -> TrainBatch:
    """Return the batch of optimiser step `step`, counted from 0."""
    members = tuple(TrainGroup(s.group, s.payload, tokens=s.log_tokens) for s in samples)
    return TrainBatch(step, config.sft.loss, members, publish=False)


def _scripts(config: RunConfig, tasks: Sequence[StreamTask], done: Container[str]) -> Iterator[ScriptTask]:
    for epoch, task in epochs(tasks, config.seed, done):
        plan = config.data.plan_of(task)
        script = script_for(task, plan, config.sft, seed=config.seed, epoch=epoch)
        yield ScriptTask(group_id(epoch, task), task, plan, script)

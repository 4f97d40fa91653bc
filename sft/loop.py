"""The cold start: demonstrations are laid out on the rollout workers and trained on by the learner.

Owner: sft. Workers read clips and write logs ahead of the learner; frames travel with the log by object reference and
the learner encodes them, so the vision tower can train. Invariant: a demonstration that cannot be laid out costs that
sample, is named, and the batch is filled with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from conf.schema import RunConfig
from rl.checkpoint import CheckpointState, commit, partial_path
from rl.cluster import Session
from rl.source import epochs, group_id
from rl.tracking import Progress, Tracker
from sft.demonstrations import script_for
from streams.dataset import SkippedSample
from streams.messages import GroupSummary, ScriptTask, TrainBatch, TrainGroup, TrainReport
from streams.task import StreamTask

AHEAD = 2
"""Batches laid out ahead of the learner."""


@dataclass
class SftResult:
    """What the cold start reports."""

    steps: int = 0
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    skipped: list[SkippedSample] = field(default_factory=list)
    seconds: float = 0.0


def run_sft(
    config: RunConfig,
    session: Session,
    tasks: tuple[StreamTask, ...],
    tracker: Tracker,
    progress: Progress,
    streaming: dict[str, Any],
) -> SftResult:
    """`sft.steps` optimiser steps, then the checkpoint `checkpoints/sft`."""
    began = time.monotonic()
    result = SftResult()
    consumed: list[str] = []
    settings = {
        "balance_decisions": float(config.sft.balance_decisions),
        "decision_weight_clamp": config.sft.decision_weight_clamp,
        "answer_weight": config.sft.answer_weight,
    }
    samples = _samples(config, session, tasks, result, progress)
    pending: Any = None
    for step in range(config.sft.steps):
        groups = [next(samples) for _ in range(config.sft.batch)]
        batch = TrainBatch(
            step,
            "sft",
            tuple(TrainGroup(summary.group, payload) for summary, payload in groups),
            settings,
            publish=False,
        )
        # Collect the step before only now: the learner never waits for the driver.
        _collect(session, pending, config.sft.steps, result, tracker, progress)
        pending = session.learner.train.options(num_returns=2).remote(batch)[0]
        consumed += [summary.group for summary, _ in groups]
    _collect(session, pending, config.sft.steps, result, tracker, progress)
    final = (config.root / "checkpoints" / "sft").resolve()
    partial = partial_path(final)
    session.call(session.learner.save.remote(str(partial), streaming), "the cold start's checkpoint")
    commit(partial, final, CheckpointState("sft", result.steps, result.steps, tuple(consumed)))
    result.seconds = time.monotonic() - began
    return result


def _samples(
    config: RunConfig, session: Session, tasks: tuple[StreamTask, ...], result: SftResult, progress: Progress
) -> Iterator[tuple[GroupSummary, Any]]:
    """Laid-out demonstrations for ever, in the order of the epochs, some batches ahead."""
    data = config.data

    def scripts() -> Iterator[ScriptTask]:
        for epoch, task in epochs(tasks, config.seed):
            turns = task.num_turns(data.video.chunk_seconds, data.tail_chunks, data.max_turns)
            script = script_for(task, turns, data.video.chunk_seconds, config.sft, seed=config.seed, epoch=epoch)
            yield ScriptTask(group_id(epoch, task), task, script)

    source = scripts()
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
        result.skipped.append(SkippedSample(f"task {script.task.id} ({script.task.video})", summary.failed))
        progress.say(f"sft: skipped {script.group}: {summary.failed}")
        if refused > len(tasks):
            raise RuntimeError(f"no demonstration could be laid out; the last: {summary.failed}")


def _collect(
    session: Session, pending: Any, total: int, result: SftResult, tracker: Tracker, progress: Progress
) -> None:
    if pending is None:
        return
    report: TrainReport = session.call(pending, f"cold-start step {result.steps + 1}")
    result.steps += 1
    loss = report.metrics["loss"]
    if result.steps == 1:
        result.first_loss = loss
    result.last_loss = loss
    tracker.metrics({f"sft/{name}": value for name, value in report.metrics.items()}, report.step + 1)
    progress.step("sft", result.steps, total, {"loss": loss, "entropy": report.metrics["entropy"]})

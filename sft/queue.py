"""Demonstrations on their way to the learner: laid out by the rollout workers, taken in the order of the epochs.

Invariants:
* samples are taken in the order in which they were sent, whichever worker finishes first;
* a sample that cannot be laid out is reported, and the next one takes its place;
* what a worker has laid out, or was about to, is lost with it, and is laid out again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.training_stage import TrainingStage
from streams.messages import GroupSummary, ScriptTask

NOBODY = -1
"""The worker of a sample that is sent to none."""


@dataclass
class _Sample:
    """A demonstration that is not trained yet.

    Attributes:
        worker: that it was sent to; None: to nobody yet.
        call: told apart by identity, as it may be sent again.
        payload: its log, by reference. summary: None until the worker has replied.
    """

    script: ScriptTask
    worker: int | None = None
    call: object = None
    payload: Any = None
    summary: GroupSummary | None = None

    def forget(self) -> None:
        """Have it laid out again."""
        self.worker = self.call = self.payload = self.summary = None


@dataclass(frozen=True)
class LaidOut:
    """A demonstration as a log, by reference."""

    group: str
    payload: Any
    log_tokens: int


class DemonstrationQueue:
    """Keeps `ahead` demonstrations at the workers or waiting; `take` cuts a batch from the front."""

    def __init__(
        self,
        stage: TrainingStage,
        scripts: Iterator[ScriptTask],
        ahead: int,
        refused: Callable[[ScriptTask, str], None],
    ) -> None:
        """refused: called with a sample that could not be laid out, and the reason, when its turn comes."""
        self._stage, self._scripts, self._ahead, self._refused = stage, scripts, ahead, refused
        self._waiting: deque[_Sample] = deque()
        self._taken: list[_Sample] = []  # of the batch that is being put together
        self._batch: list[_Sample] = []  # that was taken last
        self._turn = 0
        self._lost: set[int] = set()
        stage.revival.watch(self._worker_lost, self._worker_back)

    def fill(self) -> None:
        """Send scripts to the workers, in turns, until enough are ahead."""
        while len(self._waiting) < self._ahead:
            self._waiting.append(_Sample(next(self._scripts)))
        for sample in self._waiting:
            if sample.worker is None:
                self._send(sample)

    def take(self, count: int) -> list[LaidOut] | None:
        """Return the next `count` demonstrations, None while one of them is still at a worker."""
        while len(self._taken) < count and self._waiting and (summary := self._waiting[0].summary) is not None:
            sample = self._waiting.popleft()
            if summary.failed is None:
                self._stage.found_good()
                self._taken.append(sample)
            else:
                self._refused(sample.script, summary.failed)
            self.fill()
        if len(self._taken) < count:
            return None
        self._batch, self._taken = self._taken, []
        return [_laid_out(sample) for sample in self._batch]

    def trained(self) -> None:
        """Let go of the batch that was taken last."""
        self._batch = []

    def clear(self) -> None:
        """Let go of all samples, at the end of the stage."""
        self._waiting.clear()
        self._taken, self._batch = [], []

    def take_back(self) -> int:
        """Have the batch that was taken last laid out again, as it could not be trained. Returns its length."""
        batch, self._batch = self._batch, []
        for sample in batch:
            sample.forget()
        self._put_back(batch)
        return len(batch)

    def _put_back(self, samples: list[_Sample]) -> None:
        self._waiting.extendleft(reversed(samples))
        self.fill()

    def _send(self, sample: _Sample) -> None:
        workers = self._stage.context.session.crew.places.workers
        suspects, group = self._stage.revival.suspects, sample.script.group
        if self._given_up(sample):
            return
        living = [w for w in range(len(workers)) if w not in self._lost and suspects.may_take(w, group)]
        if not living:
            return
        worker = sample.worker = living[self._turn % len(living)]
        self._turn += 1
        suspects.sent(worker, group)
        summary, sample.payload = workers[worker].script.options(num_returns=2).remote(sample.script)
        sample.call = object()
        what = f"the demonstration of {sample.script.group}"
        self._stage.events.expect(summary, what, partial(self._arrived, sample, sample.call, worker))

    def _arrived(self, sample: _Sample, call: object, worker: int, summary: GroupSummary) -> None:
        if sample.call is call:
            self._stage.revival.alive(f"rollout-{worker}")
            self._stage.revival.suspects.over(worker, sample.script.group)
            sample.summary = summary

    def _worker_lost(self, worker: int) -> None:
        self._lost.add(worker)
        taken, self._taken = self._taken, []
        for sample in (*taken, *self._waiting):
            if sample.worker == worker:
                sample.forget()
                self._given_up(sample)
        self._put_back(taken)

    def _given_up(self, sample: _Sample) -> bool:
        """Have a sample that ends its workers refused when its turn comes."""
        group, task = sample.script.group, sample.script.task
        why = self._stage.revival.suspects.condemned(group)
        if why is not None:
            sample.worker, sample.summary = NOBODY, GroupSummary(group, task.id, NOBODY, failed=why)
        return why is not None

    def _worker_back(self, worker: int, version: int) -> None:
        self._lost.discard(worker)
        self.fill()


def _laid_out(sample: _Sample) -> LaidOut:
    assert sample.summary is not None
    return LaidOut(sample.summary.group, sample.payload, sample.summary.log_tokens)

"""Demonstrations on their way to the learner: laid out by the rollout workers, taken in the order of the epochs.

Invariants:
* samples are taken in the order in which they were sent, whichever worker finishes first;
* a sample that cannot be laid out is reported, and the next one takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.training_stage import TrainingStage
from streams.messages import GroupSummary, ScriptTask


@dataclass
class _Sent:
    """A demonstration at a worker. summary: None until the worker has replied. payload: the log, by reference."""

    script: ScriptTask
    payload: Any
    summary: GroupSummary | None = None


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
        self._waiting: deque[_Sent] = deque()
        self._taken: list[LaidOut] = []
        self._turn = 0

    def fill(self) -> None:
        """Send scripts to the workers, in turns, until enough are ahead."""
        workers = self._stage.context.session.workers
        while len(self._waiting) < self._ahead:
            script = next(self._scripts)
            worker = workers[self._turn % len(workers)]
            self._turn += 1
            summary, payload = worker.script.options(num_returns=2).remote(script)
            sent = _Sent(script, payload)
            self._waiting.append(sent)
            self._stage.events.expect(summary, f"the demonstration of {script.group}", partial(self._arrived, sent))

    def take(self, count: int) -> list[LaidOut] | None:
        """Return the next `count` demonstrations, None while one of them is still at a worker."""
        while len(self._taken) < count and self._waiting and (summary := self._waiting[0].summary) is not None:
            sent = self._waiting.popleft()
            if summary.failed is None:
                self._stage.found_good()
                self._taken.append(LaidOut(summary.group, sent.payload, summary.log_tokens))
            else:
                self._refused(sent.script, summary.failed)
            self.fill()
        if len(self._taken) < count:
            return None
        taken, self._taken = self._taken, []
        return taken

    @staticmethod
    def _arrived(sent: _Sent, summary: GroupSummary) -> None:
        sent.summary = summary

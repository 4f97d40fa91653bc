"""Writes one stage's checkpoints in the background: the learner copies and writes, a Ray task checks, flushes and renames.

Invariants:
* the learner stops for the copy alone, and neither it nor the driver waits for the disk; only a checkpoint that is due while
  the one before is still being written holds the learner up, so that there is never more than one under way, nor more to lose
  than two intervals;
* a checkpoint that could not be written, or not within `checkpoint.deadline_s`, is reported, and training continues; not if it
  was the stage's last one, nor after `checkpoint.most_failures` in a row: what is trained then would be lost, too;
* old checkpoints are deleted only after a new one is complete;
* once Ray has lost its GCS, which starts tasks, the last checkpoint is completed in this process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from runtime.cluster.events import Events, wait_for
from runtime.context import StageContext
from runtime.store.checkpoint import CheckpointState, commit, partial_path, prune, step_name

FINAL = "final"
UNDER_WAY_S = 10.0
"""How long a checkpoint that was being written when the GCS was lost is waited for: its task may be running, or never start."""


@ray.remote(num_cpus=0)
def _commit(saved: Any, beside: list[Any], partial: str, final: str, state: CheckpointState, limit_s: float) -> str:
    """Complete a checkpoint. saved: the learner's reply, for which Ray waits, and whose error it passes on.

    beside: references to wait for, whatever comes of them, but no longer than `limit_s`.
    """
    if beside:
        ray.wait(beside, num_returns=len(beside), timeout=limit_s)
    commit(Path(partial), Path(final), state)
    return final


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written. began: `time.monotonic`."""

    step: int
    final: bool
    reference: Any
    began: float


@dataclass(frozen=True)
class _Started:
    """saved: ready when the learner's part is in `partial`, which becomes `path`."""

    saved: Any
    partial: Path
    path: Path
    state: CheckpointState


class Checkpointer:
    """Checkpoints of one stage, under `run_root/checkpoints/<stage>`.

    Attributes:
        written: the steps whose checkpoints are complete.
        beside: writes what a checkpoint is to hold besides the learner's part into the folder that it is given; returns
            references to wait for.
    """

    def __init__(
        self, context: StageContext, events: Events, completed: Callable[[int], Collection[str]], began_at: int | None
    ) -> None:
        """completed: told of each step whose checkpoint is complete; returns the names of those that must outlive newer ones.

        began_at: the step that the stage goes on from.
        """
        self._context, self._config, self._events, self._completed = context, context.config, events, completed
        self.folder = (self._config.root / "checkpoints" / context.stage).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (path for path in self.folder.iterdir() if path.suffix in (".partial", ".replaced")):
            shutil.rmtree(left, ignore_errors=True)
        self.written: set[int] = set() if began_at is None else {began_at}
        self.beside: Callable[[Path], list[Any]] = lambda _: []
        self._under_way: _Save | None = None
        self._owed: CheckpointState | None = None
        self._failures = 0
        self._told = False

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._under_way is not None

    @property
    def holds(self) -> bool:
        """Whether the learner must stay as it is: its checkpoint is due, but the one before is still being written."""
        return self._owed is not None

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`. The last step's is the final one, saved apart."""
        every = self._config.checkpoint.every
        return bool(every) and step % every == 0 and step < self._context.steps

    def save(self, state: CheckpointState, *, final: bool = False) -> None:
        """Start writing, as soon as the one before is there. Raises RuntimeError if too much has failed."""
        if self.busy:
            assert not final, "the last one is written when all others are there"
            self._owed = state
            if not self._told:
                self._told = True
                self._context.progress.say(
                    f"{self._context.stage}: the checkpoint of step {state.step} is due and that of an earlier step is still "
                    "being written: training waits for it, now and whenever that happens"
                )
            return
        try:
            started = _start(self._context, self.folder, state, final=final)
        except OSError as error:
            self._failed(error, state.step, final=final)
            return
        # The last one is not gone on from, and the stage waits for it.
        beside = [] if final else self.beside(started.partial)
        reference = _commit.remote(
            started.saved,
            beside,
            str(started.partial),
            str(started.path),
            started.state,
            self._config.checkpoint.deadline_s,
        )
        self._under_way = _Save(state.step, final, reference, time.monotonic())
        self._context.saves.add(reference)
        self._events.expect(
            reference, f"the checkpoint of step {state.step}", self._saved, self._save_failed, own_limit=True
        )

    def save_alone(self, state: CheckpointState) -> None:
        """Write a checkpoint without any task, unless there is one of this step. Raises RuntimeError, OSError, RayError."""
        self._owed = None
        if self._under_way is not None:
            reference = self._under_way.reference
            self._events.forget(reference)
            if ray.wait([reference], timeout=UNDER_WAY_S)[0]:
                self._saved(ray.get(reference, timeout=UNDER_WAY_S))
            else:
                self._end()
        if state.step in self.written:
            return
        started = _start(self._context, self.folder, state, final=False)
        self._under_way = _Save(state.step, False, started.saved, time.monotonic())
        wait_for(started.saved, self._config.checkpoint.deadline_s, "the learner's part of the last checkpoint")
        commit(started.partial, started.path, started.state)
        self._saved(str(started.path))

    def settle(self) -> None:
        """Wait until none is under way, nor owed."""
        while self.busy:
            self._events.wait()

    def look(self) -> None:
        """Give up a checkpoint that takes longer than it may. Raises RuntimeError if too much has failed."""
        limit, save = self._config.checkpoint.deadline_s, self._under_way
        if save is None or time.monotonic() - save.began <= limit:
            return
        self._events.forget(save.reference)
        ray.cancel(save.reference, force=True)
        # Its files stay: whoever cannot write there may not be able to delete, and must not wait for it.
        self._over(TimeoutError(f"it was not there within checkpoint.deadline_s={limit:g} s"))

    def newest(self) -> tuple[Path, int]:
        """Return the export of the newest checkpoint, and its step."""
        step = max(self.written)
        return self.folder / (FINAL if step == self._context.steps else step_name(step)) / "hf", step

    def _saved(self, path: str) -> None:
        save = self._end()
        self._failures = 0
        self.written.add(save.step)
        self._context.stop.last_checkpoint = path
        config = self._config.checkpoint
        try:
            prune(self.folder, config.keep, config.optimizer, self._completed(save.step))
        except OSError as error:  # somebody reads there, on a file system that keeps what is open
            self._context.progress.say(f"{self._context.stage}: an old checkpoint could not be deleted: {error}")
        self._pay()

    def _save_failed(self, error: Exception) -> None:
        assert self._under_way is not None
        # Its partial files would keep a full disk full.
        name = _name(self._under_way.step, final=self._under_way.final)
        shutil.rmtree(self.folder / f"{name}.partial", ignore_errors=True)
        self._over(error)

    def _over(self, error: Exception) -> None:
        save = self._end()
        self._failed(error, save.step, final=save.final)
        self._pay()

    def _end(self) -> _Save:
        assert self._under_way is not None, "a checkpoint ends that is under way"
        save, self._under_way = self._under_way, None
        self._context.saves.discard(save.reference)
        return save

    def _pay(self) -> None:
        """Start writing the checkpoint that is owed."""
        owed, self._owed = self._owed, None
        if owed is not None:
            self.save(owed)

    def _failed(self, error: Exception, step: int, *, final: bool) -> None:
        cause = str(error).strip().splitlines()[-1]
        stage, known = self._context.stage, self._context.stop.last_checkpoint
        self._context.progress.say(f"{stage}: the checkpoint of step {step} could not be written: {cause}")
        self._failures += 1
        most = self._config.checkpoint.most_failures
        advice = f"fix that (free disk under {self.folder}?) and run again with resume=auto: it goes on from {known}"
        if final:
            raise RuntimeError(f"the final checkpoint of {stage} could not be written ({cause}); {advice}") from error
        if most and self._failures >= most:
            raise RuntimeError(
                f"{self._failures} checkpoints of {stage} in a row could not be written (checkpoint.most_failures={most}), the "
                f"last because {cause}; {advice}"
            ) from error


def _start(context: StageContext, folder: Path, state: CheckpointState, *, final: bool) -> _Started:
    """Have the learner write its part. Raises OSError."""
    context.lock.check()
    state = replace(
        state,
        tracking_run=context.tracker.run_id or "",
        settings=context.settings,
    )
    path = folder / _name(state.step, final=final)
    partial = partial_path(path)
    config = context.config.checkpoint
    saved = context.session.learners.save(
        str(partial), context.streaming, resumable=config.optimizer != "none", limit_s=config.deadline_s
    )
    return _Started(saved, partial, path, state)


def _name(step: int, *, final: bool) -> str:
    return FINAL if final else step_name(step)

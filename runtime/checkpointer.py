"""Writes one stage's checkpoints in the background: the learner saves, a Ray task checks, flushes and renames.

Invariants:
* neither learner nor driver waits until the disk is flushed;
* a checkpoint that could not be written is reported and training continues, unless it was the stage's last one;
* old checkpoints are deleted only after a new one is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from runtime.context import StageContext
from runtime.store.checkpoint import CheckpointState, commit, partial_path, prune, step_name
from runtime.store.manifests import settings

FINAL = "final"


@ray.remote(num_cpus=0)
def _commit(saved: Any, partial: str, final: str, state: CheckpointState) -> str:
    """Complete a checkpoint. saved: the learner's reply, for which Ray waits, and whose error it passes on."""
    commit(Path(partial), Path(final), state)
    return final


class Checkpointer:
    """Checkpoints of one stage, under `run_root/checkpoints/<stage>`."""

    def __init__(self, context: StageContext) -> None:
        self._context, self._config = context, context.config
        self.folder = (self._config.root / "checkpoints" / context.stage).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (path for path in self.folder.iterdir() if path.suffix in (".partial", ".replaced")):
            shutil.rmtree(left, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`. The last step's is the final one, saved apart."""
        every = self._config.checkpoint.every
        return bool(every) and step % every == 0 and step < self._context.steps

    def save(self, state: CheckpointState, *, final: bool = False) -> Any:
        """Start writing. Returns a reference that is ready when the checkpoint is complete. Raises OSError."""
        self._context.lock.check()
        name = FINAL if final else step_name(state.step)
        state = replace(
            state,
            tracking_run=self._context.tracker.run_id or "",
            settings=settings(self._config, self._context.stage),
        )
        path = self.folder / name
        partial = partial_path(path)
        resumable = self._config.checkpoint.optimizer != "none"
        saved = self._context.session.learners.save(str(partial), self._context.streaming, resumable=resumable)
        return _commit.remote(saved, str(partial), str(path), state)

    def saved(self, path: str, protect: Collection[str] = ()) -> None:
        """Note that the checkpoint at `path` is complete, and prune older ones, except the names in `protect`."""
        self._context.stop.last_checkpoint = path
        prune(self.folder, self._config.checkpoint.keep, self._config.checkpoint.optimizer, protect)

    def save_failed(self, error: Exception, step: int, *, final: bool) -> None:
        """Report that a checkpoint could not be written. Raises RuntimeError if it was the stage's last one."""
        name = FINAL if final else step_name(step)
        # Its partial files would keep a full disk full.
        shutil.rmtree(self.folder / f"{name}.partial", ignore_errors=True)
        cause = str(error).strip().splitlines()[-1]
        self._context.progress.say(
            f"{self._context.stage}: the checkpoint of step {step} could not be written: {cause}"
        )
        if final:
            raise RuntimeError(
                f"the final checkpoint of {self._context.stage} could not be written ({cause}); fix that (free disk "
                f"under {self.folder}?) and run again with resume=auto: it goes on from {self._context.stop.last_checkpoint}"
            ) from error

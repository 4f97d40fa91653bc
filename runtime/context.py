"""What every training stage gets: the session, where to report, and the state to continue from."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from runtime.cluster.session import Session
from runtime.recovery.suspects import Suspects
from runtime.stop import StopSignal
from runtime.store.checkpoint import CheckpointState
from runtime.store.runlock import RunLock
from runtime.tracking.progress import Progress
from runtime.tracking.tracker import Tracker


@dataclass
class StageLength:
    """Optimiser steps of a whole stage; fewer than planned once it is told to end sooner."""

    steps: int


@dataclass(frozen=True)
class StageContext:
    """What surrounds one training stage.

    Attributes:
        length: how many optimiser steps the stage has.
        lock: the lock on run_root, checked before a checkpoint is written.
        streaming: the contents of streaming.json in exported checkpoints.
        settings: what the stage's outcome depends on (`runtime.store.manifests`).
        resume: the state that the stage continues from; None if it starts. resumed: the checkpoint's folder.
        deaths: processes that died in the stage, by the actor's name; counted on.
        suspects: work that may have ended workers, also in earlier attempts.
        saves: references to checkpoints that are being written.
    """

    stage: str
    length: StageLength
    config: RunConfig
    session: Session
    tracker: Tracker
    progress: Progress
    stop: StopSignal
    lock: RunLock
    streaming: dict[str, Any]
    settings: dict[str, Any]
    resume: CheckpointState | None = None
    resumed: Path | None = None
    deaths: Counter[str] = field(default_factory=Counter)
    suspects: Suspects = field(default_factory=Suspects)
    saves: set[Any] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.length.steps

    def seconds(self) -> float:
        """Return the seconds since the stage began, in this attempt."""
        return time.monotonic() - self.began

    def end_with(self, step: int) -> None:
        """Make `step`, which has just been trained, the stage's last."""
        assert step <= self.steps, f"step {step} of {self.steps}"
        self.length.steps = step

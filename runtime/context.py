"""What every training stage gets: the session, where to report, and the state to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conf.schema import RunConfig
from runtime.cluster.session import Session
from runtime.stop import StopSignal
from runtime.store.checkpoint import CheckpointState
from runtime.tracking.progress import Progress
from runtime.tracking.tracker import Tracker


@dataclass(frozen=True)
class StageContext:
    """steps: optimiser steps of the whole stage. streaming: the exported checkpoints' streaming.json. resume: where the
    stage stood, None at its start. still_ours: raises if another run has taken the run_root over.
    """

    stage: str
    steps: int
    config: RunConfig
    session: Session
    tracker: Tracker
    progress: Progress
    stop: StopSignal
    streaming: dict[str, Any]
    resume: CheckpointState | None = None
    still_ours: Callable[[], None] = lambda: None
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Since the stage began, in this attempt."""
        return time.monotonic() - self.began

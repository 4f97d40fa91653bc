"""What every training stage gets: the session, where to report, and the state to go on from.

Owner: rl.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conf.schema import RunConfig
from rl.checkpoint import CheckpointState
from rl.cluster import Session
from rl.stop import StopSignal
from rl.tracking import Progress, Tracker


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

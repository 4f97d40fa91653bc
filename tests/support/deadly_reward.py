"""A user's reward term that ends its process, or cannot be interrupted, for some tasks."""

from __future__ import annotations

import collections
import itertools
import os
import signal
from dataclasses import dataclass

import numpy as np

from rewards.outcome import StreamOutcome


@dataclass(frozen=True)
class Deadly:
    """hangs, dies: parts of the ids of tasks whose every stream hangs in native code, or ends the process."""

    hangs: str = "none"
    dies: str = "none"

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        if self.hangs in outcome.task.id:
            # No signal is looked at in there, and no other thread runs.
            collections.deque(itertools.repeat(0), maxlen=0)
        if self.dies in outcome.task.id:
            os.kill(os.getpid(), signal.SIGKILL)  # as for lack of memory
        return np.ones(len(outcome.task.answers))

"""A user's reward term that never ends for streams that say `stuck`."""

from __future__ import annotations

import time

import numpy as np

from rewards.outcome import StreamOutcome


def stuck(outcome: StreamOutcome) -> np.ndarray:
    """Return float64 ones, one per expected answer."""
    while any(turn.response == "stuck" for turn in outcome.turns):
        time.sleep(60)
    return np.ones(len(outcome.task.answers))

"""A reward that differs between the streams of a group even for untrained weights, so every step has gradients."""

from __future__ import annotations

import os
import time

import numpy as np

from rewards.outcome import StreamOutcome

SLOW_VARIABLE = "SIGHTLINE_TEST_SLOW_S"


def noisy(outcome: StreamOutcome) -> np.ndarray:
    """Return one value in [0, 1] per answer, from the letters the stream wrote."""
    letters = sum(len(turn.thought) for turn in outcome.turns)
    return np.full(len(outcome.task.answers), letters % 7 / 6)


def slowly(outcome: StreamOutcome) -> np.ndarray:
    """Return the same after as many seconds as the environment says, so that a run lasts as long as a test needs it to."""
    time.sleep(float(os.environ.get(SLOW_VARIABLE, "0")))
    return noisy(outcome)

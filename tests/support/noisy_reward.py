"""A reward that differs between the streams of a group even for untrained weights, so every step has gradients."""

from __future__ import annotations

import numpy as np

from rewards.outcome import StreamOutcome


def noisy(outcome: StreamOutcome) -> np.ndarray:
    """Return one value in [0, 1] per answer, from the letters the stream wrote."""
    letters = sum(len(turn.thought) for turn in outcome.turns)
    return np.full(len(outcome.task.answers), letters % 7 / 6)

"""A user's reward term that is worth nothing, whatever the model says."""

from __future__ import annotations

import numpy as np

from rewards.outcome import StreamOutcome


def nothing(outcome: StreamOutcome) -> np.ndarray:
    """Return float64 zeros, one per expected answer."""
    return np.zeros(len(outcome.task.answers))

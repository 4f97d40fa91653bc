"""The reward for keeping to the turn layout.

Pure. It is a property of the whole stream, so every answer gets the same value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewards.outcome import StreamOutcome
from rewards.registry import register
from streams.turns import ParsedTurn


def format_score(turns: tuple[ParsedTurn, ...]) -> float:
    """Return the share of the turns that are well formed; 0 for a stream without turns."""
    return sum(turn.well_formed for turn in turns) / len(turns) if turns else 0.0


@register("format")
@dataclass(frozen=True)
class Format:
    """Reward term: `format_score`, the same for every answer of the stream."""

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        return np.full(len(outcome.task.answers), format_score(outcome.turns))

"""The reward for answering in the turn in which an answer becomes due.

Pure.

Invariants:
* a score lies in [0, 1], and is 1 in the due turn;
* moving a response away from the due turn, in either direction, never raises it;
* no response, or one before its query, scores 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from rewards.outcome import StreamOutcome, match_answers
from rewards.registry import register


def timing_score(
    response_turn: int | None,
    due_turn: int,
    query_turn: int,
    slack: float = 0.0,
    late_slope: float = 0.25,
    early_slope: float = 1.0,
    early_slack: float = 0.0,
) -> float:
    """Return 1 within the slack, then a straight line down to 0. Slacks are in chunks, slopes in reward per chunk."""
    if response_turn is None or response_turn < query_turn:
        return 0.0
    delay = response_turn - due_turn
    over, slope = (delay - slack, late_slope) if delay >= 0 else (-delay - early_slack, early_slope)
    return min(1.0, max(0.0, 1.0 - slope * max(0.0, over)))


@register("timing")
@dataclass(frozen=True)
class Timing:
    """Reward term: `timing_score` of each answer's response. By default an early response is worth 0."""

    slack: float = 0.0
    late_slope: float = 0.25
    early_slope: float = 1.0
    early_slack: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                unit = "chunks" if field.name.endswith("slack") else "reward lost per chunk"
                raise ValueError(f"{field.name}={value!r} must be a number of {unit}, at least 0")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        return np.array(
            [
                timing_score(
                    match.response_turn,
                    match.due_turn,
                    match.query_turn,
                    self.slack,
                    self.late_slope,
                    self.early_slope,
                    self.early_slack,
                )
                for match in match_answers(outcome)
            ],
            dtype=np.float64,
        )

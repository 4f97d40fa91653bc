"""The reward for right answers, whatever their time.

Pure. `streams.answers.judge` decides what is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewards.outcome import StreamOutcome, match_answers
from rewards.registry import register
from streams.answers.judge import is_correct


def correct_answers(outcome: StreamOutcome) -> tuple[bool, ...]:
    """Return, per expected answer, whether the response matched to it is right, whatever its time; False without one."""
    expected = outcome.task.answers
    return tuple(
        match.response is not None
        and is_correct(match.response, expected[match.index].text, expected[match.index].kind)
        for match in match_answers(outcome)
    )


@register("correctness")
@dataclass(frozen=True)
class Correctness:
    """Reward term: 1 for a right response, 0 for a wrong one or none."""

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        return np.array(correct_answers(outcome), dtype=np.float64)

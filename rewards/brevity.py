"""Saying no more than was asked for, and thinking no longer than is allowed.

Pure.

Invariants, with any settings:
* one more response that answers nothing never raises `response_count`;
* a longer thought never raises `think_length`, nor `think_overlong`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rewards.outcome import StreamOutcome, match_answers, spare_responses
from rewards.registry import register
from streams.turns import ParsedTurn


def mean_think_tokens(turns: tuple[ParsedTurn, ...]) -> float:
    """Return the mean tokens of a think span, with its tags, over the turns that have one; 0 if none has."""
    lengths = [turn.think_tokens for turn in turns if turn.think_tokens]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _check(name: str, value: float, unit: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be a number of {unit}, at least 0")


@register("response_count")
@dataclass(frozen=True)
class ResponseCount:
    """Reward term, the same for every answer of the stream: 1, less `slope` for each spare response beyond `slack`.

    A response is spare if it answered nothing (see `rewards.outcome`). A stream that answers nothing at all is worth 0.
    """

    slope: float = 0.25
    slack: float = 0.0

    def __post_init__(self) -> None:
        _check("slope", self.slope, "reward lost per spare response")
        _check("slack", self.slack, "responses")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        answered = any(match.response is not None for match in match_answers(outcome))
        over = max(0.0, spare_responses(outcome) - self.slack)
        return np.full(len(outcome.task.answers), max(0.0, 1.0 - self.slope * over) if answered else 0.0)


@register("think_length")
@dataclass(frozen=True)
class ThinkLength:
    """Reward term, the same for every answer of the stream: 1 up to a mean think span of `budget` tokens with its
    tags, then `slope` less per token.
    """

    budget: float = 20.0
    slope: float = 0.05

    def __post_init__(self) -> None:
        _check("budget", self.budget, "tokens")
        _check("slope", self.slope, "reward lost per token")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        over = max(0.0, mean_think_tokens(outcome.turns) - self.budget)
        return np.full(len(outcome.task.answers), max(0.0, 1.0 - self.slope * over))


@register("think_overlong")
@dataclass(frozen=True)
class ThinkOverlong:
    """Reward term, the same for every answer of the stream: the mean over its think spans, each judged by its own length.

    A span is worth 1 up to `cap - buffer` tokens with its tags, 0 from `cap` on, and falls evenly between: the soft punishment
    of what is about to be cut off, for each turn. Unlike under `think_length`, short thoughts do not make up for long ones.
    Source: DAPO's soft overlong punishment plus 1 (arXiv 2503.14476, eq. 13).
    """

    cap: float = 20.0
    buffer: float = 5.0

    def __post_init__(self) -> None:
        _check("cap", self.cap, "tokens")
        _check("buffer", self.buffer, "tokens")
        if not 0 < self.buffer <= self.cap:
            raise ValueError(f"buffer={self.buffer!r} must be above 0 and at most cap={self.cap!r}")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        spans = np.array([turn.think_tokens for turn in outcome.turns if turn.think_tokens])
        worth = np.clip((self.cap - spans) / self.buffer, 0.0, 1.0)
        return np.full(len(outcome.task.answers), worth.mean() if len(spans) else 1.0)

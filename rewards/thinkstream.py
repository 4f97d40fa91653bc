"""The rewards of ThinkStream's streaming RLVR (arXiv 2603.12938), formula by formula, odd corners included.

Pure. For reproduction; `rewards.correctness`, `rewards.timing` and `rewards.brevity` are what we would
use. Oddities kept on purpose: only the first expected answer counts; time and correctness look at the first response
that *parses*, whatever was said before it and even if the question came later; an answer in other words ("C. red",
"Yes.", "10") does not parse; longer thoughts pay. All are properties of the stream, so every answer gets the same
value. The published preset is `reward=thinkstream`; its format term is `rewards.format`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rewards.brevity import mean_think_tokens
from rewards.outcome import StreamOutcome
from rewards.registry import register
from streams.turns import ParsedTurn

_CHOICE = re.compile(r"([A-E])\.?|\(([A-E])\)")
_DIGIT = re.compile(r"[0-9]")


def literal_answer(text: str) -> str | None:
    """Return a letter A to E ("C", "(C)", "C."), yes or no in any case, or one digit; None for everything else."""
    text = text.strip()
    if choice := _CHOICE.fullmatch(text):
        return choice[1] or choice[2]
    if text.lower() in ("yes", "no"):
        return text.lower()
    return text if _DIGIT.fullmatch(text) else None


def first_literal(turns: Collection[ParsedTurn]) -> tuple[str, int] | None:
    """Return (answer, turn) of the first response that parses; None if none does."""
    for turn in sorted(turns, key=lambda turn: turn.turn):
        if turn.response is not None and (answer := literal_answer(turn.response)) is not None:
            return answer, turn.turn
    return None


def time_factor(turn: int | None, due: int, slack: int, window: int = 5) -> float:
    """Return 1 up to `slack` chunks away from the due one, early or late, then a straight line to 0 over `window` chunks."""
    if turn is None:
        return 0.0
    over = abs(turn - due) - slack
    return min(1.0, max(0.0, 1.0 - over / window))


def think_factor(mean_tokens: float, budget: int = 20, step: int = 5) -> float:
    """Return a value that rises in steps of `step` tokens to 1 at `budget - step`; always 1 if there is no room for a step.

    With the defaults: 0 below 5 tokens, 0.25 below 10, 0.5 below 15, then 1.
    """
    enough = budget - step
    if enough <= 0 or mean_tokens >= enough:
        return 1.0
    return (mean_tokens // step) / (enough // step + 1)


def count_factor(responses: int, step: int = 3, limit: int = 10) -> float:
    """Return 1 for one response, then a step down for every `step` more; 0 for none and above `limit`.

    With the defaults: 0.75 for 2 to 4 responses, 0.5 for 5 to 7, 0.25 for 8 to 10.
    """
    if responses == 1:
        return 1.0
    if not 2 <= responses <= limit:
        return 0.0
    steps = (limit - 2) // step + 1
    return 1.0 - ((responses - 2) // step + 1) / (steps + 1)


def _same_for_all(outcome: StreamOutcome, value: float) -> np.ndarray:
    return np.full(len(outcome.task.answers), value)


@register("thinkstream_time")
@dataclass(frozen=True)
class ThinkStreamTime:
    """Reward term: `time_factor` of the first response that parses. slack_s becomes whole chunks, rounded down."""

    slack_s: float = 3.0
    window: int = 5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slack_s) and self.slack_s >= 0):
            raise ValueError(f"slack_s={self.slack_s!r} must be a number of seconds, at least 0")
        if self.window < 1:
            raise ValueError(f"window={self.window!r} must be a number of chunks, at least 1")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        if not outcome.turns:
            return _same_for_all(outcome, 0.0)
        chunk = outcome.chunk_seconds
        # If the stream was cut before its answer was due, the last chunk counts as the due one.
        due = min(outcome.task.chunk_of(outcome.task.answers[0].time, chunk), len(outcome.turns) - 1)
        found = first_literal(outcome.turns)
        turn = None if found is None else found[1]
        return _same_for_all(outcome, time_factor(turn, due, int(self.slack_s / chunk), self.window))


@register("thinkstream_correctness")
@dataclass(frozen=True)
class ThinkStreamCorrectness:
    """Reward term: 1 if the first response that parses is literally the first expected answer."""

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        expected = literal_answer(outcome.task.answers[0].text)
        found = first_literal(outcome.turns)
        return _same_for_all(outcome, float(found is not None and found[0] == expected))


@register("thinkstream_efficiency")
@dataclass(frozen=True)
class ThinkStreamEfficiency:
    """Reward term: `think_factor` of the mean think span, times `count_factor` of the responses.

    The mean is over the turns that hold a think span, counted with its tags; 0 if none does.
    """

    budget: int = 20
    think_step: int = 5
    response_step: int = 3
    max_responses: int = 10

    def __post_init__(self) -> None:
        for name in ("budget", "think_step", "response_step", "max_responses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        mean = mean_think_tokens(outcome.turns)
        responses = sum(turn.response is not None for turn in outcome.turns)
        value = think_factor(mean, self.budget, self.think_step)
        return _same_for_all(outcome, value * count_factor(responses, self.response_step, self.max_responses))

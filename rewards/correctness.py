"""Is a response the expected answer? By kind of answer, forgiving of spelling, never of hedging.

Owner: rewards. Pure. Invariants: the expected text itself is always right; any other response that names two
different choices, two different numbers, or both yes and no is wrong; time plays no part here.
An expected text that does not fit its kind (a `choice` with no letter) is compared as text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewards.choices import expected_letter, letters, polarity
from rewards.numerals import integers
from rewards.outcome import StreamOutcome, match_answers
from rewards.phrases import normalise
from rewards.registry import register
from streams.task import ANSWER_KINDS, AnswerKind


def is_correct(response: str, expected: str, kind: AnswerKind) -> bool:
    """Whether `response` says `expected`.

    choice: mentions the expected letter and no other (see `rewards.choices`); or mentions no letter and is
    exactly the expected option's text, where the task gives it ("C. red").
    yes_no: says yes or no as a whole word, and not both; in Chinese, Japanese and Korean see `rewards.cjk_polarity`.
    integer: mentions that number and no other, in digits or words (see `rewards.numerals`, `rewards.han_numerals`).
    text: equal after `rewards.phrases.normalise`.
    """
    if kind not in ANSWER_KINDS:
        raise ValueError(f"answer kind {kind!r} is not one of {', '.join(ANSWER_KINDS)}: mend the dataset row")
    if response.strip() == expected.strip():
        return True
    if kind == "choice":
        return _same_choice(response, expected)
    if kind == "yes_no" and (wanted := polarity(expected)) is not None:
        return polarity(response) == wanted
    if kind == "integer" and len(number := integers(expected)) == 1 and None not in number:
        return integers(response) == number
    return normalise(response) == normalise(expected)


def _same_choice(response: str, expected: str) -> bool:
    letter, option = expected_letter(expected)
    if letter is None and len(named := letters(expected)) == 1:
        (letter,) = named  # "Option B"
    mentioned = letters(response)
    if letter is not None and mentioned:
        return mentioned == {letter}
    option = normalise(option)
    return bool(option) and normalise(response) == option


def correct_answers(outcome: StreamOutcome) -> tuple[bool, ...]:
    """Per expected answer: is the response that went to it right, whatever its time? False without one."""
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

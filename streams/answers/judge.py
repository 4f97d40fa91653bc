"""Decides whether a response is the expected answer, by kind of answer: forgiving of spelling, never of hedging.

Pure. Invariants:
* the expected text itself is always right;
* any other response that names two different choices, two different numbers, or both yes and no is wrong;
* time plays no part here.
An expected text that does not fit its kind (a `choice` with no letter) is compared as text.
"""

from __future__ import annotations

from streams.answers.choices import denied, expected_letter, letters, polarity
from streams.answers.numerals import integers
from streams.answers.phrases import normalise
from streams.task import ANSWER_KINDS, AnswerKind


def is_correct(response: str, expected: str, kind: AnswerKind) -> bool:
    """Return whether `response` says `expected`. Raises ValueError for an unknown kind.

    choice: mentions the expected letter and no other, and does not deny it (see `choices`); or mentions no letter and is
    exactly the expected option's text, where the task gives it ("C. red").
    yes_no: says yes or no as a whole word, and not both; in Chinese, Japanese and Korean see `cjk_polarity`.
    integer: mentions that number and no other, in digits or words (see `numerals`, `han_numerals`).
    text: equal after `phrases.normalise`.
    """
    if kind not in ANSWER_KINDS:
        raise ValueError(f"answer kind {kind!r} is not one of {', '.join(ANSWER_KINDS)}: correct the dataset row")
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
        return mentioned == {letter} and not denied(response)
    option = normalise(option)
    return bool(option) and normalise(response) == option

"""Finds rows that contradict themselves, so that no response could be right.

Pure. An expected answer must name what its kind compares, by the rules that responses are read with, and must not be due
after its question has closed. A row that fails is left out when its file is read.
"""

from __future__ import annotations

from streams.answers.choices import expected_letter, letters, polarity
from streams.answers.numerals import integers
from streams.task import ExpectedAnswer, StreamTask


def contradiction(task: StreamTask) -> str | None:
    """Return the first contradiction of the row, with the field and what to do; None if there is none."""
    for i, answer in enumerate(task.answers):
        if wrong := misfit(answer):
            return f"answers[{i}].kind={answer.kind}, but its text {answer.text!r} {wrong}, or use kind=text"
    return _closed(task)


def misfit(answer: ExpectedAnswer) -> str | None:
    """Return why the expected text does not fit its kind, and what would; None if it does."""
    if answer.kind == "choice" and expected_letter(answer.text)[0] is None and len(letters(answer.text)) != 1:
        return "does not begin with an option's letter: write it, as in 'B' or 'B. red'"
    if answer.kind == "yes_no" and polarity(answer.text) is None:
        return "says neither yes nor no, or both: write one"
    if answer.kind == "integer":
        number = integers(answer.text)
        if len(number) != 1 or None in number:
            return "is not one whole number: write it in digits"
    return None


def _closed(task: StreamTask) -> str | None:
    first: dict[int, int] = {}
    for i, answer in enumerate(task.answers):
        query = task.queries[answer.query]
        if query.until is not None and answer.time > query.until:
            return (
                f"answers[{i}] is due at {answer.time:g} s, after queries[{answer.query}] closes (until={query.until:g}): "
                "raise until, or drop the answer"
            )
        if not query.stay_open and answer.query in first:
            return (
                f"answers[{first[answer.query]}] and answers[{i}] both answer queries[{answer.query}], which closes with its "
                f"first response: set queries[{answer.query}].stay_open=true, or ask twice"
            )
        first.setdefault(answer.query, i)
    return None

"""Shared by the reward tests: one-second chunks (a time is a turn), streams written as {turn: text}."""

import numpy as np

from rewards import StreamOutcome, match_answers
from streams.task import ExpectedAnswer, StreamTask, TimedQuery
from streams.turns import ParsedTurn


def make_task(queries, answers, end=20.0, start=0.0):
    """Return a task. queries: times. answers: (time, text, kind, query)."""
    return StreamTask(
        id="task-7",
        video="clip.mp4",
        start=start,
        end=start + end,
        queries=tuple(TimedQuery(start + time, f"question {i}?") for i, time in enumerate(queries)),
        answers=tuple(ExpectedAnswer(start + t, text, kind, query) for t, text, kind, query in answers),
        category="proactive",
    )


def one_answer(query=2, due=5, text="red", kind="text"):
    return make_task([float(query)], [(float(due), text, kind, 0)])


def stream(said, turns=12, ill_formed=()):
    return tuple(ParsedTurn(i, "", said.get(i), i not in ill_formed) for i in range(turns))


def outcome(task, said, turns=12, ill_formed=()):
    return StreamOutcome(task, stream(said, turns, ill_formed), 1.0)


# Terms that a user might write; named by dotted path in the tests.
class Brief:
    """1 if the response has at most `words` words."""

    def __init__(self, words, strict=False):
        if words < 1:
            raise ValueError(f"words={words} must be at least 1")
        self.words, self.strict = words, strict

    def __call__(self, seen):
        return np.array([float(len((m.response or "").split()) <= self.words) for m in match_answers(seen)])


def give(seen, value=1.0, count=None):
    return np.full(len(seen.task.answers) if count is None else count, value)


def fail(seen, on=""):
    if any(turn.response == on for turn in seen.turns):
        raise KeyError("no such colour")
    return give(seen)


NOT_CALLABLE = 3


def no_outcome() -> list[float]:
    return [1.0]


class Breaks:
    def __init__(self) -> None:
        raise KeyError("gone")

    def __call__(self, outcome: StreamOutcome) -> list[float]:
        return [1.0]


def cases(table):
    return [
        (text, expected, kind) for (expected, kind), texts in table.items() for text in dict.fromkeys(texts.split("|"))
    ]

"""Matches responses to expected answers: the one rule that every reward term uses.

Turn indices are chunk indices of `StreamTask.chunk_of`.

Invariants:
* a response is matched to at most one answer, and an answer to at most one response;
* no response before its query's turn is ever matched;
* only turns that the stream really had count: an answer due after the last turn stays unanswered unless it was answered
  early.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from streams.task import StreamTask
from streams.turns import ParsedTurn


@dataclass(frozen=True)
class StreamOutcome:
    """What a stream was asked and what it did: everything that a reward term may read."""

    task: StreamTask
    turns: tuple[ParsedTurn, ...]
    chunk_seconds: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.chunk_seconds) and self.chunk_seconds > 0):
            raise ValueError(
                f"chunk_seconds={self.chunk_seconds} of task {self.task.id} must be a positive number of seconds "
                "(data.video.chunk_seconds, data.video.max_chunks): turns cannot be placed in time without it"
            )


@dataclass(frozen=True)
class AnswerMatch:
    """Expected answer number `index` and the response matched to it (None, None if there is none)."""

    index: int
    query_turn: int
    due_turn: int
    response_turn: int | None = None
    response: str | None = None


@dataclass(frozen=True)
class DueAnswer:
    """An expected answer placed on the stream's turns."""

    index: int
    query: int
    query_turn: int
    due_turn: int
    time: float


def due_answers(task: StreamTask, chunk_seconds: float) -> tuple[DueAnswer, ...]:
    """Return the expected answers of `task`, in its order, placed on turns."""
    return tuple(
        DueAnswer(
            index=i,
            query=answer.query,
            query_turn=task.chunk_of(task.queries[answer.query].time, chunk_seconds),
            due_turn=task.chunk_of(answer.time, chunk_seconds),
            time=answer.time,
        )
        for i, answer in enumerate(task.answers)
    )


def most_recently_due(waiting: Collection[DueAnswer], turn: int) -> DueAnswer | None:
    """Return the unanswered answer that became due last at or before `turn`; of equals, the first in the task."""
    due = [answer for answer in waiting if answer.due_turn <= turn]
    return max(due, key=lambda answer: (answer.time, -answer.index), default=None)


def _answered_early(waiting: Collection[DueAnswer], turn: int) -> DueAnswer | None:
    """Return the unanswered answer of the query asked last; of that query's answers, the one due next."""
    asked = [answer for answer in waiting if answer.query_turn <= turn]
    # Queries are sorted by time, so a later index was asked later, within one turn too.
    return max(asked, key=lambda answer: (answer.query, -answer.time, -answer.index), default=None)


def match_answers(outcome: StreamOutcome) -> tuple[AnswerMatch, ...]:
    """Return one match per expected answer, in the task's order.

    Responses are taken in time order. Each goes to the most recently due unanswered answer; if none is due,
    to the unanswered answer of the query asked last (an early response). With one query and one answer this
    is the first response in or after the query's turn.
    """
    return _assign(outcome)[0]


def spare_responses(outcome: StreamOutcome) -> int:
    """Return how many responses answered nothing: before any query, or after every answer had its response."""
    return _assign(outcome)[1]


def _assign(outcome: StreamOutcome) -> tuple[tuple[AnswerMatch, ...], int]:
    answers = due_answers(outcome.task, outcome.chunk_seconds)
    waiting = {answer.index: answer for answer in answers}
    taken: dict[int, ParsedTurn] = {}
    spare = 0
    for turn in sorted(outcome.turns, key=lambda t: t.turn):
        if turn.response is None:
            continue
        found = most_recently_due(waiting.values(), turn.turn) or _answered_early(waiting.values(), turn.turn)
        if found is None:
            spare += 1
            continue
        del waiting[found.index]
        taken[found.index] = turn
    matches = []
    for answer in answers:
        said = taken.get(answer.index)
        matches.append(
            AnswerMatch(
                index=answer.index,
                query_turn=answer.query_turn,
                due_turn=answer.due_turn,
                response_turn=None if said is None else said.turn,
                response=None if said is None else said.response,
            )
        )
    return tuple(matches), spare

"""Streams played from a script: the perfect one and the silent one.

They show the range of a reward, through the same scoring code as a model's stream.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from rewards.outcome import due_answers, most_recently_due
from streams.task import Plan, StreamTask
from streams.turns import ParsedTurn


def oracle_turns(
    task: StreamTask, plan: Plan, fits: Mapping[int, str] | None = None, think_tokens: int = 0
) -> tuple[ParsedTurn, ...]:
    """Return a stream that gives every expected answer in its due turn and is silent elsewhere.

    A turn has one response. If several answers are due in the same turn, the others follow late, in the next free turns:
    a task that nobody can answer perfectly then shows as an oracle below 1. Answers due after the last turn are not said.

    fits: by index, the part that is said of answers that are longer than a turn.
    think_tokens: length of every turn's think span.
    """
    waiting = {answer.index: answer for answer in due_answers(task, plan.chunk_seconds)}
    turns = []
    for turn in range(plan.turns):
        due = most_recently_due(waiting.values(), turn) if waiting else None
        if due is None:
            turns.append(_silent(turn, think_tokens))
            continue
        del waiting[due.index]
        said = (fits or {}).get(due.index, task.answers[due.index].text)
        turns.append(ParsedTurn(turn, "", said, well_formed=True, think_tokens=think_tokens))
    return tuple(turns)


def silent_turns(num_turns: int) -> tuple[ParsedTurn, ...]:
    """Return a well-formed stream that never speaks."""
    return tuple(_silent(turn, 0) for turn in range(num_turns))


@functools.lru_cache(maxsize=4096)
def _silent(turn: int, think_tokens: int) -> ParsedTurn:
    # Most turns of a script: made once, not once for each of thousands of rows.
    return ParsedTurn(turn, "", None, well_formed=True, think_tokens=think_tokens)

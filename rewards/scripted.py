"""Streams played from a script: the perfect one and the silent one.

Owner: rewards. They show the range of a reward, through the same scoring code as a model's stream.
"""

from __future__ import annotations

from rewards.outcome import due_answers, most_recently_due
from streams.task import StreamTask
from streams.turns import ParsedTurn


def oracle_turns(task: StreamTask, chunk_seconds: float, num_turns: int) -> tuple[ParsedTurn, ...]:
    """Every expected answer in its due turn, silence elsewhere.

    A turn holds one response: of answers due in the same turn, the rest follow in the next free turns,
    late, so a task that nobody can answer perfectly shows as an oracle below 1. Answers due after the last
    turn are not said.
    """
    waiting = {answer.index: answer for answer in due_answers(task, chunk_seconds)}
    turns = []
    for turn in range(num_turns):
        due = most_recently_due(waiting.values(), turn)
        if due is not None:
            del waiting[due.index]
        said = None if due is None else task.answers[due.index].text
        turns.append(ParsedTurn(turn=turn, thought="", response=said, well_formed=True))
    return tuple(turns)


def silent_turns(num_turns: int) -> tuple[ParsedTurn, ...]:
    """A well-formed stream that never speaks."""
    return tuple(ParsedTurn(turn=turn, thought="", response=None, well_formed=True) for turn in range(num_turns))

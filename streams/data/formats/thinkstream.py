"""ThinkStream's JSONL records (arXiv 2603.12938; repository CASIA-IVA-Lab/ThinkStream), for cold start and RLVR alike.

One record is a video with a timed conversation:

    {"video_path": "a.mp4",
     "conversations": [{"role": "user", "content": "...", "timestamp": 3.0},
                       {"role": "assistant", "content": "...", "timestamp": 12.5}],
     "thoughts": [{"think": "...", "timestamp": 0.5}], "num_tokens": 4096}

`thoughts` and `num_tokens` are optional, and the latter is not used. A user message without `timestamp` is asked at 0.
`duration` (seconds of the whole video) is an optional field of ours, see `streams.data.durations`.

Invariants:
* messages are taken in the order of their timestamps;
* an answer belongs to the latest question at or before it;
* a question with several answers stays open, so that the first of them does not close it;
* nothing else is guessed.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any

from streams.data.durations import bounded
from streams.data.fields import Fields, shown
from streams.task import AnswerKind, ExpectedAnswer, StreamTask, TimedQuery, TimedThought

_ROW_KEYS = {"video_path", "conversations", "thoughts", "num_tokens", "duration"}
_MESSAGE_KEYS = {"role", "content", "timestamp"}
_CHOICE = re.compile(r"[A-E]|\([A-E]\)(?:\s.*)?|[A-E][.):](?:\s.*)?", re.DOTALL)
_YES_NO = re.compile(r"(?:yes|no)[.!]?", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?[0-9]+\.?")


def is_record(value: Any) -> bool:
    """Return whether a JSON value is one of these records, and not a row of our own format."""
    return isinstance(value, dict) and ("video_path" in value or "conversations" in value)


def answer_kind(text: str) -> AnswerKind:
    """Return the kind of an expected answer, which the records do not name.

    `choice`: a capital A to E alone ("B", "(B)", "B.", "B)", "B:"), the marked forms also with the option's text after
    a space ("B. red"). `yes_no`: yes or no alone. `integer`: digits alone, with or without a sign. A full stop may
    follow those two. Everything else is `text`.
    """
    text = text.strip()
    if _CHOICE.fullmatch(text):
        return "choice"
    if _YES_NO.fullmatch(text):
        return "yes_no"
    return "integer" if _INTEGER.fullmatch(text) else "text"


def parse_record(value: Any, folder: Path, number: int) -> StreamTask:
    """Return the task of the record in line `number`; its id is `NUMBER-VIDEO`, its category the first answer's kind.

    folder: the one that a relative video path starts from. Raises ValueError that says which field is wrong and why.
    """
    row = Fields(value, "", _ROW_KEYS)
    video = row.path("video_path")
    if row.has("num_tokens") and row.integer("num_tokens", 0) < 0:
        raise ValueError("num_tokens must not be negative")
    queries, answers = _messages(row)
    asked = [time for time, _ in queries]
    owners = [_owner(asked, time, where) for time, _, where in answers]
    several = {query for query in owners if owners.count(query) > 1}
    expected = tuple(
        ExpectedAnswer(time, text, answer_kind(text), owner)
        for (time, text, _), owner in zip(answers, owners, strict=True)
    )
    thoughts = [
        TimedThought(_time(item), item.text("think", empty=True))
        for item in row.items("thoughts", {"think", "timestamp"}, optional=True)
    ]
    task = StreamTask(
        id=f"{number}-{Path(video).stem}",
        video=str(folder / video),
        start=0.0,
        end=math.inf,
        queries=tuple(TimedQuery(time, text, stay_open=i in several) for i, (time, text) in enumerate(queries)),
        answers=expected,
        thoughts=tuple(sorted(thoughts, key=lambda thought: thought.time)),
        category=expected[0].kind if expected else "",
    )
    return bounded(task, row.number("duration")) if row.has("duration") else task


def _messages(row: Fields) -> tuple[list[tuple[float, str]], list[tuple[float, str, str]]]:
    """Return (time, text) of the questions and (time, text, place in the row) of the answers, each sorted by time."""
    queries: list[tuple[float, str]] = []
    answers: list[tuple[float, str, str]] = []
    for message in row.items("conversations", _MESSAGE_KEYS):
        role, text = message.text("role"), message.text("content")
        if role == "user":
            queries.append((_time(message, 0.0), text))
        elif role == "assistant":
            answers.append((_time(message), text, message.where))
        else:
            raise ValueError(f"{message.where}.role must be user or assistant, not {shown(role)}")
    for what, found in (("user", queries), ("assistant", answers)):
        if not found:
            raise ValueError(f"conversations holds no {what} message: a task needs a question and an answer")
    # The sort is stable: messages of one time keep the order of the file.
    return sorted(queries, key=lambda query: query[0]), sorted(answers, key=lambda answer: answer[0])


def _owner(asked: list[float], time: float, where: str) -> int:
    """Return the index of the latest question at or before `time`. Raises ValueError if there is none."""
    found = bisect_right(asked, time) - 1
    if found < 0:
        raise ValueError(f"{where}: an answer at {time:g} s, before the first question (at {asked[0]:g} s)")
    return found


def _time(item: Fields, default: float | None = None) -> float:
    time = item.seconds("timestamp", default)
    if time < 0:
        raise ValueError(f"{item.where}.timestamp={time:g} must not be negative")
    return time

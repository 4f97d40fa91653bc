"""Sightline's own row format: one JSON object per StreamTask, read and written here.

Invariant: `parse_row` makes of `row_of(task)` a task equal to `task`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from streams.data.fields import Fields
from streams.task import AnswerKind, ExpectedAnswer, StreamTask, TimedQuery, TimedThought


def parse_row(value: Any, folder: Path) -> StreamTask:
    """Return the task of one row. folder: the one that a relative video path starts from.

    Raises ValueError that says which field is wrong and why.
    """
    row = Fields(value, "", _ROW_KEYS)
    return StreamTask(
        id=row.text("id"),
        video=str(folder / row.path("video")),
        start=row.number("start", 0.0),
        end=row.number("end") if row.has("end") else math.inf,
        queries=tuple(_query(item) for item in row.items("queries", {"time", "text", "stay_open", "until"})),
        answers=tuple(_answer(item) for item in row.items("answers", {"time", "text", "kind", "query"})),
        thoughts=tuple(
            TimedThought(item.number("time"), item.text("text", empty=True))
            for item in row.items("thoughts", {"time", "text"}, optional=True)
        ),
        category=row.text("category", "", empty=True),
    )


_ROW_KEYS = {"id", "video", "start", "end", "queries", "answers", "thoughts", "category"}


def _query(item: Fields) -> TimedQuery:
    time, text, stay_open = item.number("time"), item.text("text"), item.flag("stay_open")
    until = item.number("until") if item.has("until") else None
    try:
        return TimedQuery(time, text, stay_open, until)
    except ValueError as error:
        raise ValueError(f"{item.where}: {error}") from None


def _answer(item: Fields) -> ExpectedAnswer:
    time, text, kind = item.number("time"), item.text("text"), item.text("kind", "text")
    query = item.integer("query", 0)
    try:
        # The constructor checks that `kind` is one of the known ones.
        return ExpectedAnswer(time, text, cast(AnswerKind, kind), query)
    except ValueError as error:
        raise ValueError(f"{item.where}: {error}") from None


def row_of(task: StreamTask, folder: Path) -> dict[str, Any]:
    """Return the row of a task, for a file in `folder`: a video below that folder gets a relative path."""
    video = Path(task.video).absolute()
    name = str(video.relative_to(folder)) if video.is_relative_to(folder) else str(video)
    row: dict[str, Any] = {
        "id": task.id,
        # A leading ~ would be read back as a home folder.
        "video": f"./{name}" if name.startswith("~") else name,
        "start": task.start,
        **({"end": task.end} if math.isfinite(task.end) else {}),
        "queries": [_query_row(query) for query in task.queries],
        "answers": [
            {"time": answer.time, "text": answer.text, "kind": answer.kind, "query": answer.query}
            for answer in task.answers
        ],
    }
    if task.thoughts:
        row["thoughts"] = [{"time": thought.time, "text": thought.text} for thought in task.thoughts]
    if task.category:
        row["category"] = task.category
    return row


def _query_row(query: TimedQuery) -> dict[str, Any]:
    row: dict[str, Any] = {"time": query.time, "text": query.text}
    if query.stay_open:
        row["stay_open"] = True
    if query.until is not None:
        row["until"] = query.until
    return row

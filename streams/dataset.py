"""Task files: JSONL, one StreamTask per line, read row by row so that a bad row costs that row only.

Owner: streams. Invariants: every message names file, line and field; nothing is guessed (unknown keys, wrong
types and non-finite numbers are errors); ids are unique; a file is always read afresh, never from a cache of
an older version. Whether a video exists is not asked here: a missing one costs its sample when it is read.
"""

from __future__ import annotations

import glob
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from streams.task import AnswerKind, ExpectedAnswer, StreamTask, TimedQuery, TimedThought

HINT = "(set data.* or run job=data)"


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out. source: file and line, or a task's id."""

    source: str
    reason: str


@dataclass(frozen=True)
class TaskFile:
    """What a file held: the usable rows in file order, and those left out."""

    tasks: tuple[StreamTask, ...]
    skipped: tuple[SkippedSample, ...]


def load_tasks(path: str | Path, *, on_bad: Literal["raise", "skip"] = "skip") -> TaskFile:
    """Reads a JSONL file of tasks. Relative video paths count from the file's folder.

    on_bad: a bad row is listed in `skipped`, or raises ValueError. A file without any usable row always
    raises.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r} must be 'raise' or 'skip'")
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"task file {path} {what} {HINT}")
    if path.stat().st_size == 0:
        raise ValueError(f"task file {path} is empty {HINT}")
    folder = path.absolute().parent
    tasks: list[StreamTask] = []
    skipped: list[SkippedSample] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            task = parse_row(line, folder)
            if task.id in first_line:
                raise ValueError(f"id={task.id!r} is already used in line {first_line[task.id]}")
        except ValueError as error:
            if on_bad == "raise":
                raise ValueError(f"{source}: {error}") from None
            skipped.append(SkippedSample(source, str(error)))
            continue
        first_line[task.id] = number
        tasks.append(task)
    if not tasks:
        found = f"; the first problem: {skipped[0].source}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"task file {path} holds no usable row {HINT}{found}")
    return TaskFile(tuple(tasks), tuple(skipped))


def write_tasks(path: str | Path, tasks: Iterable[StreamTask]) -> None:
    """Writes a file that `load_tasks` reads back to equal tasks; it replaces an older one in one step."""
    path = Path(path)
    folder = path.absolute().parent
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for task in tasks:
                # ensure_ascii: the separators that some readers take for line breaks (U+2028) are escaped.
                file.write(json.dumps(_row(task, folder), ensure_ascii=True, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def parse_row(line: str, folder: Path) -> StreamTask:
    """One line of the file as a task; ValueError says which field is wrong and why."""
    if "\ufffd" in line:
        raise ValueError("the line holds bytes that are not UTF-8")
    try:
        value = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not a task: JSON nested too deeply") from None
    row = _Fields(value, "", _ROW_KEYS)
    return StreamTask(
        id=row.text("id"),
        video=str(folder / row.text("video")),
        start=row.number("start", 0.0),
        end=row.number("end"),
        queries=tuple(_query(item) for item in row.items("queries", {"time", "text", "stay_open", "until"})),
        answers=tuple(_answer(item) for item in row.items("answers", {"time", "text", "kind", "query"})),
        thoughts=tuple(
            TimedThought(item.number("time"), item.text("text", empty=True))
            for item in row.items("thoughts", {"time", "text"}, optional=True)
        ),
        category=row.text("category", "", empty=True),
    )


_ROW_KEYS = {"id", "video", "start", "end", "queries", "answers", "thoughts", "category"}


class _Fields:
    """A JSON object whose values are fetched by type. where: the object's own place in the row, '' for the
    row.
    """

    def __init__(self, value: Any, where: str, allowed: set[str]) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the row'} must be an object, not {_shown(value)}")
        unknown = sorted(value.keys() - allowed)
        if unknown:
            raise ValueError(f"unknown field {self._name(unknown[0])} (known: {', '.join(sorted(allowed))})")
        self._values: Mapping[str, Any] = value

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _get(self, key: str, default: Any) -> Any:
        if key in self._values:
            return self._values[key]
        if default is None:
            raise ValueError(f"{self._name(key)} is missing")
        return default

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self._name(key)} must be a number, not {_shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{self._name(key)} must be a finite number, it overflows")
        return number

    def integer(self, key: str, default: int) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self._name(key)} must be a whole number, not {_shown(value)}")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self._name(key)} must be true or false, not {_shown(value)}")
        return value

    def text(self, key: str, default: str | None = None, *, empty: bool = False) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{self._name(key)} must be a string, not {_shown(value)}")
        if not empty and not value.strip():
            raise ValueError(f"{self._name(key)} is empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{self._name(key)} holds half of a surrogate pair: {value!a}") from None
        return value

    def items(self, key: str, allowed: set[str], *, optional: bool = False) -> Iterator[_Fields]:
        value = self._get(key, [] if optional else None)
        if not isinstance(value, list):
            raise ValueError(f"{self._name(key)} must be a list, not {_shown(value)}")
        for i, item in enumerate(value):
            yield _Fields(item, f"{self._name(key)}[{i}]", allowed)

    def has(self, key: str) -> bool:
        return key in self._values


def _query(item: _Fields) -> TimedQuery:
    time, text, stay_open = item.number("time"), item.text("text"), item.flag("stay_open")
    until = item.number("until") if item.has("until") else None
    try:
        return TimedQuery(time, text, stay_open, until)
    except ValueError as error:
        raise ValueError(f"{item.where}: {error}") from None


def _answer(item: _Fields) -> ExpectedAnswer:
    time, text, kind = item.number("time"), item.text("text"), item.text("kind", "text")
    query = item.integer("query", 0)
    try:
        # The constructor checks that `kind` is one of the known ones.
        return ExpectedAnswer(time, text, cast(AnswerKind, kind), query)
    except ValueError as error:
        raise ValueError(f"{item.where}: {error}") from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a task can hold")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice} appears twice in one object")
    return found


def _row(task: StreamTask, folder: Path) -> dict[str, Any]:
    video = Path(task.video).absolute()
    row: dict[str, Any] = {
        "id": task.id,
        "video": str(video.relative_to(folder)) if video.is_relative_to(folder) else str(video),
        "start": task.start,
        "end": task.end,
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


def _lines(path: Path) -> Iterator[str]:
    """The file's lines, streamed by `datasets`: there is no cache, a rewritten file is read anew."""
    # Imported here: it takes a second, and many processes use this module for its types only.
    import datasets

    with _offline(datasets.config):
        rows = datasets.load_dataset(
            "text",
            # The name is matched as a pattern, brackets in a folder's name must not mean anything.
            data_files={"train": [glob.escape(str(path.absolute()))]},
            split="train",
            streaming=True,
            # A byte that is not UTF-8 would end the whole file; replaced, it costs its line.
            encoding_errors="replace",
        )
        for row in rows:
            yield row["text"]


@contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Local files only: no look-ups, no download counts. The environment is read before, at import: too
    early.
    """
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before

"""Task files: JSONL, one StreamTask per line, read row by row so that a bad row costs that row only.

Two formats (`PARSERS`): our own, which is read and written, and ThinkStream's, which is read.

Invariants:
* every message names file, line and field;
* nothing is guessed: unknown keys, wrong types and non-finite numbers are errors;
* ids are unique within a file;
* a row costs a few bytes of memory (`streams.data.rows`), and is parsed once;
* a file is always read afresh, never from a cache of an older version;
* a row whose video lies outside the folder that confines it is left out, and its video is not opened;
* a video is not opened here unless its length is needed: a missing one costs its sample when it is read.
"""

from __future__ import annotations

import glob
import json
import math
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from streams.answers.contradictions import contradiction
from streams.data.durations import measured
from streams.data.fields import MAX_TEXT_BYTES, parse_line
from streams.data.formats.sightline import parse_row, row_of
from streams.data.formats.thinkstream import is_record, parse_record
from streams.data.rows import VIDEOS_KNOWN, TaskRows
from streams.support.files import digest
from streams.support.redact import redact
from streams.task import Reason, StreamTask, VideoFile
from streams.video.config import VideoConfig
from streams.video.confined import outside

PARSERS: dict[str, Callable[[Any, Path, int], StreamTask]] = {
    "sightline": lambda value, folder, number: parse_row(value, folder),
    "thinkstream": parse_record,
}
"""By format, the function (value, folder that relative paths start from, line number) -> task; it raises ValueError."""
FORMATS = ("auto", *PARSERS)
DIGEST_BYTES = 16
HINT = "(set data.* or run job=data)"


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out.

    source: file and line, or the task's id and video. kind: the class of the reason, which takes no part in equality.
    """

    source: str
    reason: str
    kind: Reason = field(default=Reason.STREAM, compare=False)

    def __post_init__(self) -> None:
        # The reason may be any exception's text, such as that of a reward that asks a server.
        object.__setattr__(self, "source", redact(self.source))
        object.__setattr__(self, "reason", redact(self.reason))
        # Read back from the JSON of a checkpoint or manifest, it is a string.
        object.__setattr__(self, "kind", Reason(self.kind))

    @classmethod
    def of(cls, task: StreamTask, reason: str, kind: Reason) -> SkippedSample:
        """Return the sample for a task that failed after it was read; the task's row is added to the reason."""
        return cls(f"task {task.id} ({task.video})", reason + at_row(task), kind)

    @classmethod
    def failure(cls, task: StreamTask, failed: str) -> SkippedSample:
        """Return the sample for a task whose stream failed. failed: begins with the name of the exception's class."""
        kind = Reason.VIDEO if failed.startswith("VideoError:") else Reason.STREAM
        if failed.startswith("OverBudget:"):
            kind = Reason.THOUGHT_TOO_LONG if "layout.think_budget" in failed else Reason.ANSWER_TOO_LONG
        return cls.of(task, failed, kind)


def counted(samples: Iterable[SkippedSample]) -> dict[str, int]:
    """Return the number of samples of each kind, by its name."""
    return dict(sorted(Counter(str(sample.kind) for sample in samples).items()))


def at_row(task: StreamTask) -> str:
    """Return " (row FILE:LINE)" for the end of a message, '' for a task that was made in code."""
    return f" (row {task.origin})" if task.origin else ""


@dataclass(frozen=True)
class TaskFile:
    """What a file held: the usable rows in file order, and those left out. digest: of its contents, see `files.digest`."""

    tasks: TaskRows
    skipped: tuple[SkippedSample, ...]
    digest: str = ""


def load_tasks(
    path: str | Path,
    *,
    on_bad: Literal["raise", "skip"] = "skip",
    format: str = "auto",
    video: VideoConfig | None = None,
    ignore_fields: Collection[str] = (),
    root: str | Path = "",
) -> TaskFile:
    """Read a JSONL file of tasks. Relative video paths start from the file's folder.

    A row is bad if it cannot be parsed or contradicts itself (see `streams.answers.contradictions`).

    Args:
        on_bad: "skip" lists a bad row in `skipped`, "raise" raises ValueError for it.
        format: one of `FORMATS`; `auto` goes by the fields of the first row.
        video: if its chunk length depends on a task's length, videos of unknown length are opened to measure them.
        ignore_fields: fields that rows may have and that are ignored.
        root: folder that every video must lie in, with symbolic links followed; '' = the file's folder.

    Raises FileNotFoundError without a file, ValueError if it has no usable row, `root` is no folder, or the file is changed
    while it is read.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r} must be 'raise' or 'skip'")
    if format not in FORMATS:
        raise ValueError(f"data.format={format!r} is not one of {', '.join(FORMATS)}")
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"task file {path} {what} {HINT}")
    if path.stat().st_size == 0:
        raise ValueError(f"task file {path} is empty {HINT}")
    if "::" in str(path):
        raise ValueError(f"task file {path}: `datasets` cannot open a path with `::` in it: rename it, or link to it")
    before, contents = _stamp(path), digest(path)
    skipped: list[tuple[int, str, Reason]] = []

    def bad(number: int, reason: str, kind: Reason) -> None:
        if on_bad == "raise":
            raise ValueError(f"{path}:{number}: {reason}")
        skipped.append((number, reason, kind))

    seen = _Ids()
    tasks = _sound(_parsed(path, format, ignore_fields, _Videos(path, root), seen.add, bad), bad)
    lines = array("Q")
    rows = TaskRows.of(_noted(tasks, lines))
    if again := seen.again():
        for i, number in enumerate(lines):
            if number in again:
                bad(number, f"id={rows[i].id!r} is already used in line {again[number]}", Reason.UNREADABLE)
        rows = rows.select([i for i, number in enumerate(lines) if number not in again])
    reasons = tuple(SkippedSample(f"{path}:{number}", reason, kind) for number, reason, kind in sorted(skipped))
    if _stamp(path) != before:
        raise ValueError(f"task file {path} was changed while it was read: start again once nobody writes to it")
    file = _not_empty(path, TaskFile(rows, reasons, contents))
    return file if video is None else with_lengths(path, file, video, on_bad=on_bad)


def with_lengths(
    path: str | Path, file: TaskFile, video: VideoConfig, *, on_bad: Literal["raise", "skip"] = "skip"
) -> TaskFile:
    """Return what was read of a file, with all that is left out because its video cannot be measured: see `load_tasks`."""
    if not video.max_chunks or all(math.isfinite(task.end) for task in file.tasks):
        return file
    skipped = list(file.skipped)

    def bad(row: int, reason: str) -> None:
        source = file.tasks[row].origin
        if on_bad == "raise":
            raise ValueError(f"{source}: {reason}")
        skipped.append(SkippedSample(source, reason, Reason.VIDEO))

    rows = TaskRows.of(task for _, task in measured(enumerate(file.tasks), video, bad))
    skipped.sort(key=lambda sample: int(sample.source.rpartition(":")[2]))
    return _not_empty(path, replace(file, tasks=rows, skipped=tuple(skipped)))


def _not_empty(path: str | Path, file: TaskFile) -> TaskFile:
    if not file.tasks:
        first = "".join(f"; the first problem: {sample.source}: {sample.reason}" for sample in file.skipped[:1])
        raise ValueError(f"task file {path} holds no usable row {HINT}{first}")
    return file


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sound(
    tasks: Iterable[tuple[int, StreamTask]], bad: Callable[[int, str, Reason], None]
) -> Iterator[tuple[int, StreamTask]]:
    """Yield the tasks that do not contradict themselves; hand the others to `bad`."""
    for number, task in tasks:
        if (reason := contradiction(task)) is None:
            yield number, task
        else:
            bad(number, f"task {task.id}: {reason}", Reason.CONTRADICTORY)


def _noted(tasks: Iterable[tuple[int, StreamTask]], lines: array[int]) -> Iterator[StreamTask]:
    """Yield the tasks; their line numbers are added to `lines`."""
    for number, task in tasks:
        lines.append(number)
        yield task


class _Ids:
    """The ids of a file's rows, as digests: they are compared when all are there."""

    def __init__(self) -> None:
        self._digests, self._lines = bytearray(), array("Q")

    def add(self, task_id: str, number: int) -> None:
        self._digests += blake2b(task_id.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()
        self._lines.append(number)

    def again(self) -> dict[int, int]:
        """Return the lines whose id an earlier line has, with that line, in their order."""
        digests = np.frombuffer(self._digests, np.uint64).reshape(-1, DIGEST_BYTES // 8)
        order = np.lexsort(digests.T)  # stable: of equal ones the first line comes first
        same = np.concatenate([[False], (digests[order[1:]] == digests[order[:-1]]).all(axis=1)])
        firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        return dict(
            sorted((self._lines[order[i]], self._lines[order[firsts[i]]]) for i in np.flatnonzero(same).tolist())
        )


class _Videos:
    """The video files that rows may name."""

    def __init__(self, path: Path, root: str | Path) -> None:
        self._root = os.path.realpath(root or path.absolute().parent)
        if not os.path.isdir(self._root):
            raise ValueError(f"data.root={root} is not a folder: name the one that holds the videos, or / for any file")
        # Rows about one video tend to follow one another.
        self.file = lru_cache(VIDEOS_KNOWN)(self._file)

    def _file(self, video: str) -> VideoFile | str:
        """Return what a row's video is, or why the row may not name it."""
        return outside(video, self._root) or VideoFile(self._root, _size(video))


def _size(video: str) -> int | None:
    try:
        return os.stat(video).st_size
    except OSError:
        return None


def sample_tasks(
    path: str | Path,
    count: int,
    *,
    format: str = "auto",
    ignore_fields: Collection[str] = (),
    root: str | Path = "",
) -> tuple[StreamTask, ...]:
    """Return at most `count` tasks, from rows spread over the whole file. Bad rows among them are left out."""
    path = Path(path)
    total = sum(1 for _ in _lines(path))
    wanted = {1 + round(i * (total - 1) / max(1, count - 1)) for i in range(count)}
    videos = _Videos(path, root)
    found = _parsed(path, format, ignore_fields, videos, lambda *_: None, lambda *_: None, only=wanted)
    return tuple(task for _, task in found)


def _parsed(
    path: Path,
    format: str,
    ignore_fields: Collection[str],
    videos: _Videos,
    seen: Callable[[str, int], None],
    bad: Callable[[int, str, Reason], None],
    only: Collection[int] | None = None,
) -> Iterator[tuple[int, StreamTask]]:
    """Yield (line number, task) of every row that can be parsed; hand the others to `bad`.

    seen: told of each id and its line. only: lines to look at.
    """
    folder = path.absolute().parent
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or (only is not None and number not in only and format != "auto"):
            continue
        try:
            value = parse_line(line, ignore_fields)
            if format == "auto" and isinstance(value, dict):
                # A file has one format: its first object decides.
                format = "thinkstream" if is_record(value) else "sightline"
            # A line that is not an object does not tell a format; our own parser says what is wrong with it.
            task = PARSERS["sightline" if format == "auto" else format](value, folder, number)
            asked = sum(len(query.text.encode()) for query in task.queries)
            if asked > MAX_TEXT_BYTES:
                raise ValueError(
                    f"its {len(task.queries)} questions have {asked:,} bytes, more than {MAX_TEXT_BYTES:,}"
                )
        except ValueError as error:
            bad(number, str(error), Reason.UNREADABLE)
            continue
        seen(task.id, number)
        file = videos.file(task.video)
        if isinstance(file, str):
            bad(number, f"task {task.id}: {file}", Reason.VIDEO)
            continue
        yield number, replace(task, origin=f"{path}:{number}", file=file)


def write_tasks(path: str | Path, tasks: Iterable[StreamTask]) -> None:
    """Write a file that `load_tasks` reads back as equal tasks; an older one is replaced atomically."""
    path = Path(path)
    folder = path.absolute().parent
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for task in tasks:
                # ensure_ascii also escapes the separators that some readers take for line breaks (U+2028).
                file.write(json.dumps(row_of(task, folder), ensure_ascii=True, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _lines(path: Path) -> Iterator[str]:
    """Yield the file's lines, streamed by `datasets`: nothing is cached, so a rewritten file is read anew."""
    # Imported here: it takes a second, and many processes need only the types of this module.
    import datasets

    with _local_and_light(datasets.config):
        rows = datasets.load_dataset(
            "text",
            # The name is matched as a pattern: brackets in a folder's name must not mean anything.
            data_files={"train": [glob.escape(str(path.absolute()))]},
            split="train",
            streaming=True,
            # A byte that is not UTF-8 would fail the whole file; replaced, it costs only its line.
            encoding_errors="replace",
        )
        for row in rows:
            yield row["text"]


@contextmanager
def _local_and_light(config: Any) -> Iterator[None]:
    """Let `datasets` read local files only, without look-ups or download counts, and load no torch in the driver.

    Both are settings of the `datasets` module, which it otherwise takes from the environment when it is imported.
    """
    before = config.HF_HUB_OFFLINE, config.TORCH_AVAILABLE
    # Where torch is installed, a streamed dataset keeps its epoch number in a tensor.
    config.HF_HUB_OFFLINE, config.TORCH_AVAILABLE = True, False
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, config.TORCH_AVAILABLE = before

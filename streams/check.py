"""Look at a task file before training on it: `python -m streams.check FILE`.

Owner: streams. Reads every row, opens every distinct video and decodes its first frame, by the same code as a run.
Prints what a run would use and what it would skip, and why. Exit status: 0 if all rows are usable, 1 if some are not,
2 if none is. `--write OUT` keeps the usable rows, in our own format and with the videos' lengths as their ends.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from streams.dataset import FORMATS, SkippedSample, load_tasks, write_tasks
from streams.durations import bounded, known_presentation
from streams.layout import STREAMING_TOKENS
from streams.presentation import Presentation
from streams.task import StreamTask
from streams.video import ClipReader, VideoConfig, VideoError

_CONTROL = re.compile("|".join([r"<\|[a-z_]+\|>", *map(re.escape, STREAMING_TOKENS)]))


@dataclass
class Checked:
    """What was found. skipped: rows by file and line, then rows by task and video."""

    usable: list[StreamTask] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    videos: int = 0
    late: dict[str, float] = field(default_factory=dict)
    """Videos whose first picture is missed by the first frames of a stream, and when it appears."""


def check(path: Path, *, format: str = "auto", ignore_fields: tuple[str, ...] = ()) -> Checked:
    """Reads the rows and opens their videos. Raises ValueError or OSError if the file holds nothing usable."""
    loaded = load_tasks(path, format=format, ignore_fields=ignore_fields)
    found = Checked(skipped=list(loaded.skipped))
    films: dict[str, Presentation | str] = {}
    with ClipReader(VideoConfig()) as reader:
        for task in loaded.tasks:
            if task.video not in films:
                films[task.video] = _opened(reader, task.video)
            film = films[task.video]
            try:
                if isinstance(film, str):
                    raise ValueError(film)
                _refuse_control_tokens(task)
                found.usable.append(_within(task, film))
            except ValueError as error:
                found.skipped.append(SkippedSample(f"task {task.id} ({task.video})", str(error)))
    found.videos = len(films)
    found.late = {video: film.first for video, film in films.items() if isinstance(film, Presentation) and film.late}
    return found


def _opened(reader: ClipReader, video: str) -> Presentation | str:
    """What the video shows, or why it cannot be used."""
    try:
        film = known_presentation(reader, video)
        reader.read(video, 0.0, math.inf, 1)
    except VideoError as error:
        return error.reason
    return film


def _within(task: StreamTask, film: Presentation) -> StreamTask:
    """The task, once it fits into its video; its end is known afterwards."""
    film.check_span(task.end)
    return task if math.isfinite(task.end) else bounded(task, film.end)


def _refuse_control_tokens(task: StreamTask) -> None:
    """A run refuses such a text when it lays out the stream: it could forge a turn."""
    texts = [(f"queries[{i}].text", query.text) for i, query in enumerate(task.queries)]
    texts += [(f"answers[{i}].text", answer.text) for i, answer in enumerate(task.answers)]
    texts += [(f"thoughts[{i}].text", thought.text) for i, thought in enumerate(task.thoughts)]
    for name, text in texts:
        if spelled := _CONTROL.search(text):
            raise ValueError(f"{name} spells the control token {spelled[0]!r}")


def report(path: Path, found: Checked, video: VideoConfig) -> list[str]:
    """The lines that are printed."""
    lines = [f"skipped {sample.source}: {sample.reason}" for sample in found.skipped]
    lines.append(f"{path}: {len(found.usable)} rows usable, {len(found.skipped)} skipped, {found.videos} videos opened")
    if found.late:
        latest = max(found.late, key=found.late.__getitem__)
        lines.append(
            f"{len(found.late)} videos whose picture starts later than 0 s "
            f"(the latest at {found.late[latest]:.2f} s: {latest}): black until then"
        )
    if not found.usable:
        return lines
    answers = [answer for task in found.usable for answer in task.answers]
    kinds: Counter[str] = Counter(answer.kind for answer in answers)
    categories = Counter(task.category or "(none)" for task in found.usable)
    seconds = [task.end - task.start for task in found.usable]
    chunks = [task.due_turns(video.chunk_seconds_of(task)) for task in found.usable]
    thoughts = sum(len(task.thoughts) for task in found.usable)
    return [
        *lines,
        f"answers: {_counted(kinds)}; to {sum(len(task.queries) for task in found.usable)} questions",
        f"categories: {_counted(categories)}",
        f"thoughts: {thoughts}" + ("" if thoughts else " (a cold start would demonstrate empty ones)"),
        f"length: {_spread(seconds)} s; chunks up to the last answer: {_spread(chunks)}",
    ]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _spread(values: list[float] | list[int]) -> str:
    return f"{min(values):g} to {max(values):g}, median {statistics.median(values):g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m streams.check", description="Check a task file and its videos.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="auto", help="as data.format")
    parser.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="as data.ignore_fields")
    parser.add_argument("--chunk-seconds", type=float, default=1.0, help="as data.video.chunk_seconds")
    parser.add_argument("--max-chunks", type=int, default=0, help="as data.video.max_chunks")
    parser.add_argument("--write", type=Path, metavar="OUT", help="write the usable rows in our own format")
    options = parser.parse_args(arguments)
    try:
        video = VideoConfig(chunk_seconds=options.chunk_seconds, max_chunks=options.max_chunks)
        found = check(options.file, format=options.format, ignore_fields=tuple(options.ignore_field))
        if options.write and found.usable:
            write_tasks(options.write, found.usable)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(report(options.file, found, video)))
    if not found.usable:
        return 2
    return 1 if found.skipped else 0


if __name__ == "__main__":
    sys.exit(main())

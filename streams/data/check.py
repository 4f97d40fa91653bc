"""Check a task file before training on it: `sightline check FILE` or `python -m streams.data.check FILE`.

Reads every row, opens every distinct video, decodes its first frame, and judges the rows. Prints what a run would use,
leave out and warn about, each with file and line. `--write OUT` writes the usable rows in our own format, with the
videos' lengths as their ends.

Exit status: 0 if there is nothing to fix, 1 if there is, 2 if no row is usable or a file cannot be read or written.

Invariants:
* rows are read and judged by the code that a run uses when it starts;
* the checked file, a video, or anything that is not a regular file is never overwritten;
* what could not be checked is said.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streams.answers.judge import is_correct
from streams.data.answerable import CERTAIN_TOKENS, lost, overlap, spelled_token, texts_of, too_long, untimely
from streams.data.dataset import FORMATS, SkippedSample, load_tasks, write_tasks
from streams.data.durations import bounded, known_presentation
from streams.layout.layout import Layout, LayoutConfig, OverBudget
from streams.support.paths import user_path
from streams.support.terminal import escape_unprintable_output, one_line
from streams.task import Plan, Reason, StreamTask
from streams.video.config import VideoConfig
from streams.video.presentation import Presentation
from streams.video.reader import ClipReader, VideoError

_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")
"""Matches what looks like a control token of some model; only its tokenizer can tell whether it is one."""
MAX_TURNS = 240
"""The default of data.max_turns."""


@dataclass
class Checked:
    """What was found.

    Attributes:
        usable: rows that a run would use, their ends known.
        skipped: rows that a run would leave out.
        warned: usable rows of which something is lost.
        suspects: (task, text) of rows with what looks like a control token, where there was no tokenizer to ask.
        videos: how many distinct videos were opened.
        late: videos whose first picture comes after the first frames of a stream: the seconds at which it appears.
    """

    usable: list[StreamTask] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    warned: list[SkippedSample] = field(default_factory=list)
    suspects: list[tuple[StreamTask, str]] = field(default_factory=list)
    videos: int = 0
    late: dict[str, float] = field(default_factory=dict)


def check(
    path: Path,
    *,
    format: str = "auto",
    ignore_fields: tuple[str, ...] = (),
    video: VideoConfig | None = None,
    max_turns: int = MAX_TURNS,
    layout: Layout | None = None,
    root: str | Path = "",
) -> Checked:
    """Read the rows, open their videos and judge them under a run's settings.

    layout: judges the texts by its tokenizer and budgets; None: they are judged as far as possible without one.
    root: see `load_tasks`.
    Raises ValueError or OSError if the file cannot be read or no row of it can be parsed.
    """
    video = video or VideoConfig()
    loaded = load_tasks(path, format=format, ignore_fields=ignore_fields, root=root)
    found = Checked(skipped=list(loaded.skipped))
    films: dict[str, Presentation | str] = {}
    with ClipReader(video) as reader:
        for task in loaded.tasks:
            if task.video not in films:
                films[task.video] = _opened(reader, task.video)
            film = films[task.video]
            try:
                if isinstance(film, str):
                    raise ValueError(film)
                fitted = _within(task, film)
                _refuse_unread(reader, task, fitted)
            except ValueError as error:
                reason = error.reason if isinstance(error, VideoError) else str(error)
                found.skipped.append(_sample(task, reason, Reason.VIDEO))
                continue
            _judge(found, fitted, video, max_turns, layout)
    found.videos = len(films)
    found.late = {video: film.first for video, film in films.items() if isinstance(film, Presentation) and film.late}
    return found


def _refuse_unread(reader: ClipReader, task: StreamTask, fitted: StreamTask) -> None:
    """Raise VideoError if a run could not read the chunk of the last answer, which the row puts after the video's end.

    Only with constant chunk lengths (data.video.max_chunks=0): such a run does not ask for the length of a video.
    """
    chunk = reader.config.chunk_seconds
    if not reader.config.max_chunks and task.due_turns(chunk) > fitted.due_turns(chunk):
        reader.read_task(task, Plan(task.due_turns(chunk), chunk))


def _sample(task: StreamTask, reason: str, kind: Reason) -> SkippedSample:
    return SkippedSample(f"{task.origin}: task {task.id} ({task.video})", reason, kind)


def _judge(found: Checked, task: StreamTask, video: VideoConfig, max_turns: int, layout: Layout | None) -> None:
    """Sort a row with a readable video into usable or skipped, as RL would.

    What only a cold start refuses is a warning.
    """
    if refused := spelled_token(task, layout):
        found.skipped.append(_sample(task, refused, Reason.CONTROL_TOKEN))
        return
    chunk = video.chunk_seconds_of(task)
    # A tail would come after every answer and cannot change a verdict.
    findings = untimely(task, Plan(task.num_turns(chunk, 0, max_turns), chunk), max_turns)
    for i, answer in enumerate(task.answers):
        fits = None if layout is None else layout.fitting(answer.text)
        if layout is not None and fits is not None and not is_correct(fits, answer.text, answer.kind):
            findings.append(too_long(i, fits, layout.config.max_new_tokens))
    samples = [_sample(task, finding.reason, finding.kind) for finding in findings]
    if lost(task, findings):
        found.skipped.append(samples[0])
        return
    found.usable.append(task)
    found.warned += samples
    if layout is None:
        looks = [match[0] for _, text in texts_of(task) for match in _LIKE_CONTROL.finditer(text)]
        found.suspects += [(task, looks[0])] if looks else []
        return
    for thought in task.thoughts:
        try:
            layout.within_budgets(thought.text, None, task.chunk_of(thought.time, chunk))
        except OverBudget as error:
            found.warned.append(_sample(task, f"a cold start leaves the row out: {error}", Reason.THOUGHT_TOO_LONG))
            break


def _opened(reader: ClipReader, video: str) -> Presentation | str:
    """Return what the video shows, or why it cannot be used."""
    try:
        film = known_presentation(reader, video)
        reader.read(video, 0.0, math.inf, 1)
    except VideoError as error:
        return error.reason
    return film


def _within(task: StreamTask, film: Presentation) -> StreamTask:
    """Return the task with a known end. Raises ValueError if it does not fit into its video."""
    film.check_span(task.end)
    return task if math.isfinite(task.end) else bounded(task, film.end)


def report(path: Path, found: Checked, video: VideoConfig) -> list[str]:
    """Return the lines to print."""
    lines = [f"skipped {sample.source}: {sample.reason}" for sample in found.skipped]
    lines += [f"warning: {sample.source}: {sample.reason}" for sample in found.warned]
    rows = f"{len(found.usable)} rows usable, {len(found.skipped)} skipped, {found.videos} videos opened"
    lines.append(f"{path}: {rows}" + (f", {len(found.warned)} warnings" if found.warned else ""))
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


def not_checked(found: Checked) -> str:
    """Return the line that says what only the model's tokenizer can tell."""
    line = (
        "not checked, name the model with --model DIR: whether answers and thoughts fit into a turn, and whether a text spells "
        f"a control token of the model other than {', '.join(CERTAIN_TOKENS)}"
    )
    if found.suspects:
        task, text = found.suspects[0]
        line += f"; {len(found.suspects)} rows hold what looks like one, for example {task.origin}: {text!r}"
    return line


def leaks(found: Checked, path: Path, against: Path, other: Sequence[StreamTask]) -> str | None:
    """Return a warning if rows repeat a question of the other file about the same video, else None."""
    pairs = overlap(other, found.usable)
    if not pairs:
        return None
    return (
        f"warning: {len(pairs)} of {len(found.usable)} rows of {path} ask what a row of {against} asks about the same video, "
        f"for example {pairs[0][0].origin} and {pairs[0][1].origin}: one file cannot show what was learned from the other"
    )


def refuse_loss(out: Path, path: Path, videos: set[str]) -> None:
    """Raise ValueError or OSError if writing `out` would lose something, or is not possible."""
    folder = out.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--write {out}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"--write {out}: the folder {folder} cannot be written to")
    if not os.path.lexists(out):
        return
    if out.is_dir() or (out.exists() and not out.is_file()):
        what = "a folder" if out.is_dir() else "no regular file"
        raise ValueError(f"--write {out} is {what}: name the file to write")
    if out.exists() and out.samefile(path):
        raise ValueError(
            f"--write {out} is the file that is checked ({path}): its unusable rows would be lost, name another"
        )
    if out.exists() and not os.access(out, os.W_OK):
        raise PermissionError(f"--write {out} exists and is read-only: name another file")
    if out.exists() and any(os.path.exists(video) and out.samefile(video) for video in videos):
        raise ValueError(f"--write {out} is a video of the checked rows: name another file")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _spread(values: list[float] | list[int]) -> str:
    return f"{min(values):g} to {max(values):g}, median {statistics.median(values):g}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options. `model=DIR` and `against=FILE`, in the style of launch.py, work too."""
    parser = argparse.ArgumentParser(prog="sightline check", description="Check a task file and its videos.")
    parser.add_argument("file", type=user_path)
    parser.add_argument("--format", choices=FORMATS, default="auto", help="as data.format")
    parser.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="as data.ignore_fields")
    parser.add_argument("--root", type=user_path, metavar="DIR", help="as data.root")
    parser.add_argument("--chunk-seconds", type=float, default=1.0, help="as data.video.chunk_seconds")
    parser.add_argument("--max-chunks", type=int, default=0, help="as data.video.max_chunks")
    parser.add_argument("--max-turns", type=int, default=MAX_TURNS, help="as data.max_turns")
    parser.add_argument("--model", metavar="DIR", help="checkpoint whose tokenizer judges the texts, as model.path")
    layout = LayoutConfig()
    parser.add_argument("--max-new-tokens", type=int, default=layout.max_new_tokens, help="as layout.max_new_tokens")
    parser.add_argument("--think-budget", type=int, default=layout.think_budget, help="as layout.think_budget")
    parser.add_argument(
        "--against", type=user_path, metavar="FILE", help="warn about questions that this file also asks"
    )
    parser.add_argument("--write", type=user_path, metavar="OUT", help="write the usable rows in our own format")
    words = [f"--{word}" if word.startswith(("model=", "against=")) else word for word in arguments]
    return parser.parse_args(words)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status (see the module docstring)."""
    escape_unprintable_output()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        found, status, lines = run(options)
        # Before writing: the findings are worth knowing even where the file cannot be written.
        printed = _print(lines)
        if options.write and found.usable:
            refuse_loss(options.write, options.file, {task.video for task in found.usable})
            write_tasks(options.write, found.usable)
    except (ValueError, OSError) as error:
        print(one_line(str(error)), file=sys.stderr)
        return 2
    return status if printed else 2


def run(options: argparse.Namespace) -> tuple[Checked, int, list[str]]:
    """Check, and return what was found, the exit status and the lines to print.

    Raises ValueError or OSError for options that cannot be used, as well as those of `check`.
    """
    if options.max_turns < 1:
        raise ValueError(f"--max-turns {options.max_turns} must be at least 1")
    video = VideoConfig(chunk_seconds=options.chunk_seconds, max_chunks=options.max_chunks)
    budgets = LayoutConfig(think_budget=options.think_budget, max_new_tokens=options.max_new_tokens)
    fields = tuple(options.ignore_field)
    if options.write:
        refuse_loss(options.write, options.file, set())
    layout = None if options.model is None else model_layout(options.model, budgets)
    found = check(
        options.file,
        format=options.format,
        ignore_fields=fields,
        video=video,
        max_turns=options.max_turns,
        layout=layout,
        root=options.root or "",
    )
    lines = report(options.file, found, video)
    if options.model is None:
        lines.append(not_checked(found))
    leak = None
    if options.against:
        other = load_tasks(options.against, format=options.format, ignore_fields=fields, root=options.root or "").tasks
        leak = leaks(found, options.file, options.against, other)
        lines += [leak] if leak else []
    status = 1 if found.skipped or found.warned or leak else 0
    return found, status if found.usable else 2, lines


def model_layout(model: str, budgets: LayoutConfig) -> Layout:
    """Return the layout of a checkpoint folder or hub id. Raises ValueError or OSError if it cannot be loaded."""
    # Imported here: torch and transformers take seconds, and a check without a model needs neither.
    from streams.backbone.vocabulary import text_layout
    from streams.checkpoint.folder import resolve_checkpoint

    folder = resolve_checkpoint(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model {model}: no config.json there; give a checkpoint folder or a hub id")
    return text_layout(folder, budgets)


def _print(lines: list[str]) -> bool:
    """Print the lines and return whether that worked; a reader that leaves early (`| head`) is no failure."""
    try:
        print("\n".join(map(one_line, lines)), flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"standard output: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

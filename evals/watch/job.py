"""job=watch: stream one file through the engine and print, turn by turn, what the model thinks and says.

There is one greedy stream in this process: no Ray, no learner. A turn's line has its time, thought, answer or silence,
the tokens in memory after it, and the time that the engine took.

Invariants:
* layout, memory, chunk length and pixel budget come from the checkpoint's streaming.json;
* an override that contradicts it is used and named;
* what can be refused is refused here, before `evals.watch.stream` loads torch and the model.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from conf.schema import RunConfig
from evals.watch.watched import WatchedFile, WatchedTurn
from runtime.checks import check_memory_policy
from runtime.starting_point import StartingPoint
from streams.checkpoint.folder import STREAMING_FILE, resolve_checkpoint
from streams.checkpoint.weights import check_weights
from streams.support.strict_json import dumps
from streams.support.terminal import visible
from streams.task import TimedQuery
from streams.video.reader import ClipReader


def watch(config: RunConfig, overrides: list[str]) -> None:
    """Run `job=watch`; a configuration or file that cannot be used ends the process with status 2."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        checkpoint, config = _resolve(config, overrides)
        shown = _shown(config)
        # Only now: it takes seconds to load, which a wrong path should not cost.
        from evals.watch.stream import watch_file

        turns = watch_file(config, checkpoint, shown)
        _introduce(config, checkpoint, shown, console)
        for turn in turns:
            if config.watch.json:
                print(dumps(asdict(turn), ensure_ascii=False), flush=True)
            else:
                _print_turn(turn, console)
    except BrokenPipeError:
        raise  # the reader of our output has gone, which is no configuration error
    except (ValueError, OSError) as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)


def _resolve(config: RunConfig, overrides: list[str]) -> tuple[Path, RunConfig]:
    """Return the checkpoint's folder, and the configuration with its streaming.json applied. Raises ValueError."""
    if not config.watch.video:
        raise ValueError("watch.video is empty: give the file to watch, as in job=watch video=FILE")
    if not config.model.path:
        raise ValueError("model.path is empty: give the checkpoint to watch with, as in job=watch model=FOLDER")
    checkpoint = resolve_checkpoint(config.model.path)
    if not (checkpoint / "config.json").is_file() and (checkpoint / "hf" / "config.json").is_file():
        checkpoint = checkpoint / "hf"  # one of our checkpoints: its export
    for warning in check_weights(checkpoint).warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not (checkpoint / STREAMING_FILE).is_file():
        print(
            f"warning: {checkpoint} has no streaming.json: watching with the configuration's settings", file=sys.stderr
        )
    start = StartingPoint.at(replace(config, model=replace(config.model, path=str(checkpoint))), checkpoint)
    config = start.respected(overrides, lambda line: None, lambda line: print(f"warning: {line}", file=sys.stderr))
    check_memory_policy(config, start)
    return checkpoint, config


def _shown(config: RunConfig) -> WatchedFile:
    """Return the part of the file to watch. Raises ValueError if it cannot be read, or the query is after its end."""
    watching = config.watch
    video = str(Path(watching.video).absolute())
    with ClipReader(config.data.video) as reader:
        film = reader.presentation(video)
    length = film.end
    if watching.query and watching.at >= length:
        raise ValueError(f"watch.at={watching.at:g} lies after the end of {video} ({length:.1f} s)")
    end = min(length, watching.seconds or length)
    if end <= film.first:
        raise ValueError(
            f"watch.seconds={watching.seconds:g} ends before the first picture of {video}, which appears at {film.first:.2f} s"
        )
    if film.late:
        print(f"warning: the first picture of {video} appears at {film.first:.2f} s: black until then", file=sys.stderr)
    query = (TimedQuery(watching.at, watching.query),) if watching.query and watching.at < end else ()
    return WatchedFile(video, end, query, length=length)


def _introduce(config: RunConfig, checkpoint: Path, shown: WatchedFile, console: Console) -> None:
    if config.watch.json:
        return
    video = config.data.video
    seconds = video.chunk_seconds_of(replace(shown, end=shown.length))
    console.print(
        f"{visible(config.watch.video)} with {checkpoint}\n{seconds:g} s a chunk, {video.frames_per_chunk} frames each; "
        f"memory {config.memory.words}"
    )


def _print_turn(turn: WatchedTurn, console: Console) -> None:
    if turn.query:
        console.print(f"{'':>14}  ? {visible(turn.query)}", style="bold")
    span = f"{turn.start_s:6.1f}-{turn.end_s:.1f} s"
    cost = f"[{turn.memory_tokens} tokens in memory, {turn.memory_video} of video; {turn.seconds * 1000:.0f} ms]"
    console.print(f"{span:>14}  . {visible(turn.thought) or '-'}  {cost}", style="dim")
    if turn.response is not None:
        console.print(f"{'':>14}  > {visible(turn.response)}", style="bold green")
    elif not turn.well_formed:
        console.print(f"{'':>14}  ! this turn did not keep to the layout", style="yellow")

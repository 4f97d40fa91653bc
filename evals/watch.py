"""job=watch: stream one file through the engine and print, second by second, what the model thinks and says.

Owner: evals. One stream, greedy, in this process: no Ray, no learner. Layout, memory, chunk length and pixel budget come
from the checkpoint's streaming.json; an override that contradicts it is used and named. What is printed of a turn:
its time, thought, answer or silence, tokens in memory after it, and the seconds that the engine took for it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import torch
from rich.console import Console

from conf.schema import RunConfig
from conf.streaming import apply_streaming, overridden_keys, read_streaming
from rollout.cache import KVPool
from rollout.engine import Engine, StreamRequest
from streams.backbone import Backbone
from streams.inputs import turn_inputs
from streams.log import Kind, LogHeader, StreamLog
from streams.memory import knobs, make_policy
from streams.pretrained import resolve_checkpoint
from streams.task import TimedQuery
from streams.turns import ParsedTurn
from streams.video import Clip, ClipReader
from streams.writer import StreamWriter


@dataclass(frozen=True)
class WatchedFile:
    """What is shown: the first `end` seconds of a file, with its queries (see streams.inputs)."""

    video: str
    end: float
    queries: tuple[TimedQuery, ...]
    start: float = 0.0
    id: str = "watch"

    def chunk_of(self, time: float, chunk_seconds: float) -> int:
        return math.floor(time / chunk_seconds + 1e-6)


@dataclass(frozen=True)
class WatchedTurn:
    """One line of output. memory_tokens: tokens a next token would see; of these, memory_video are video."""

    start_s: float
    end_s: float
    query: str
    thought: str
    response: str | None
    well_formed: bool
    memory_tokens: int
    memory_video: int
    seconds: float


class EncodedOnDemand(Sequence[torch.Tensor]):
    """A clip's features, one chunk at a time, when the engine asks for it: as a live stream would be."""

    def __init__(self, backbone: Backbone, clip: Clip) -> None:
        self._backbone, self._clip = backbone, clip

    def __len__(self) -> int:
        return len(self._clip.frames)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with torch.no_grad():
            return self._backbone.encode_video([self._clip.frames[index : index + 1]])[0][0]


def watch(config: RunConfig, overrides: list[str]) -> None:
    """Run `job=watch`; a configuration or file that cannot be used ends the process with status 2."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        checkpoint, config = _resolve(config, overrides, console)
        turns = watch_file(config, checkpoint)
        _introduce(config, checkpoint, console)
        for turn in turns:
            if config.watch.json:
                print(json.dumps(asdict(turn), ensure_ascii=False), flush=True)
            else:
                _print_turn(turn, console)
    except (ValueError, OSError) as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)


def _resolve(config: RunConfig, overrides: list[str], console: Console) -> tuple[Path, RunConfig]:
    """The checkpoint folder, and the configuration with what its streaming.json says. Raises ValueError."""
    if not config.watch.video:
        raise ValueError("watch.video is empty: give the file to watch, as in job=watch video=FILE")
    if not config.model.path:
        raise ValueError("model.path is empty: give the checkpoint to watch with, as in job=watch model=FOLDER")
    checkpoint = resolve_checkpoint(config.model.path)
    if not (checkpoint / "config.json").is_file() and (checkpoint / "hf" / "config.json").is_file():
        checkpoint = checkpoint / "hf"  # one of our checkpoints: its export
    saved = read_streaming(checkpoint)
    if not saved:
        print(
            f"warning: {checkpoint} has no streaming.json: watching with the configuration's settings", file=sys.stderr
        )
    applied = apply_streaming(config, saved, overridden_keys(overrides))
    for conflict in applied.conflicts:
        print(f"warning: {conflict}; the override is used", file=sys.stderr)
    return checkpoint, applied.config


def watch_file(config: RunConfig, checkpoint: Path) -> Iterator[WatchedTurn]:
    """The turns of one greedy stream over `watch.video`, as the engine finishes them. Raises ValueError."""
    watching = config.watch
    video = str(Path(watching.video).expanduser().absolute())
    with ClipReader(config.data.video) as reader:
        length = reader.duration(video)
    if watching.query and watching.at >= length:
        raise ValueError(f"watch.at={watching.at:g} lies after the end of {video} ({length:.1f} s)")
    end = min(length, watching.seconds or length)
    query = (TimedQuery(watching.at, watching.query),) if watching.query and watching.at < end else ()
    shown = WatchedFile(video, end, query)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = Backbone.load(checkpoint, config.layout, dtype=_dtype(checkpoint, device), device=device)
    seconds = config.data.video.chunk_seconds_of(WatchedFile(video, length, ()))
    with ClipReader(config.data.video, backbone.image.patch_size, backbone.image.merge_size) as reader:
        chunks = max(1, math.ceil(end / seconds - 1e-6))
        clip = reader.read(video, 0.0, end, chunks, chunk_seconds=seconds)
    request = _request(config, backbone, shown, clip, seconds)
    slot_bytes = KVPool.bytes_per_slot(backbone.num_layers, *backbone.kv_shape, backbone.dtype)
    engine = Engine(backbone, config.rollout.kv_memory_mb * 2**20 // slot_bytes, 1)
    writer = engine.add(request)
    return _turns(engine, writer, shown, seconds)


def _turns(engine: Engine, writer: StreamWriter, shown: WatchedFile, seconds: float) -> Iterator[WatchedTurn]:
    began, reported = time.monotonic(), 0
    asked = {shown.chunk_of(query.time, seconds): query.text for query in shown.queries}
    while engine.busy:
        finished = engine.step()
        over = writer.state is not None and writer.state.over
        if not over or writer.turn < reported:
            continue
        now = time.monotonic()
        parsed = _parse(engine, writer, writer.turn, finished)
        kinds = writer.log.column("kind")[writer.live]
        yield WatchedTurn(
            start_s=writer.turn * seconds,
            end_s=min(shown.end, (writer.turn + 1) * seconds),
            query=asked.get(writer.turn, ""),
            thought=parsed.thought,
            response=parsed.response,
            well_formed=parsed.well_formed,
            memory_tokens=len(kinds),
            memory_video=int((kinds == Kind.VIDEO).sum()),
            seconds=now - began,
        )
        began, reported = time.monotonic(), writer.turn + 1


def _parse(engine: Engine, writer: StreamWriter, turn: int, finished: list[StreamLog]) -> ParsedTurn:
    log = finished[0] if finished else writer.finish()
    return engine.backbone.layout.parse_turns(log)[turn]


def _request(config: RunConfig, backbone: Backbone, shown: WatchedFile, clip: Clip, seconds: float) -> StreamRequest:
    video = config.data.video
    return StreamRequest(
        header=LogHeader(
            stream_id=shown.id,
            task_id=shown.id,
            backbone=backbone.name,
            policy=config.memory.name,
            policy_knobs=knobs(config.memory),
            position_convention=backbone.position_convention,
            banned=backbone.layout.banned,
            seed=config.seed,
            temperature=0.0,
            score_temperature=1.0,
        ),
        turns=turn_inputs(shown, clip, backbone.layout, seconds, backbone.image.merge_size),
        features=EncodedOnDemand(backbone, clip),
        policy=make_policy(config.memory),
        layout=backbone.layout,
        patch_seconds=seconds / (video.frames_per_chunk // backbone.image.temporal_patch_size),
    )


def _dtype(checkpoint: Path, device: str) -> torch.dtype:
    """As the checkpoint was saved; on CPU always float32, where half precision is slow."""
    if device == "cpu":
        return torch.float32
    name = json.loads((checkpoint / "config.json").read_text()).get("dtype", "bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def _introduce(config: RunConfig, checkpoint: Path, console: Console) -> None:
    if config.watch.json:
        return
    memory, video = config.memory, config.data.video
    window = "" if memory.name == "full" else f" of {memory.window} chunks"
    console.print(
        f"{config.watch.video} with {checkpoint}\n{video.chunk_seconds:g} s a chunk, {video.frames_per_chunk} frames each; "
        f"memory {memory.name}{window}",
        markup=False,
    )


def _print_turn(turn: WatchedTurn, console: Console) -> None:
    if turn.query:
        console.print(f"{'':>14}  ? {turn.query}", style="bold", markup=False)
    span = f"{turn.start_s:6.1f}-{turn.end_s:.1f} s"
    cost = f"[{turn.memory_tokens} tokens in memory, {turn.memory_video} of video; {turn.seconds * 1000:.0f} ms]"
    console.print(f"{span:>14}  . {turn.thought or '-'}  {cost}", style="dim", markup=False)
    if turn.response is not None:
        console.print(f"{'':>14}  > {turn.response}", style="bold green", markup=False)
    elif not turn.well_formed:
        console.print(f"{'':>14}  ! this turn did not keep to the layout", style="yellow", markup=False)

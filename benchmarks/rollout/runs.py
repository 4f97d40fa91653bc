"""One run of a world through the engine or a baseline, timed as a whole and turn by turn.

Invariants:
* vision is inside the time of every run: the engine's clips are encoded once, a baseline encodes as its specification says;
* engines and buffers are made before the clock starts, as a worker makes them once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.baselines.copy_evict import CopyEvict, Generated
from benchmarks.rollout.presets import PATCH_SECONDS, World
from rollout.engine.engine import Engine
from rollout.engine.request import StreamRequest, stream_bound
from streams.backbone.tower import ClipEncoding
from streams.log.record import GENERATED, StreamLog
from tests.support.one_step import OneStepEngine


def make_engine(world: World, requests: Sequence[StreamRequest], *, engine_type: type = Engine, **settings: Any) -> Any:
    """Return an engine with room for all these streams at once. settings: of `Engine`, beside its defaults."""
    slots = sum(stream_bound(request) for request in requests)
    return engine_type(world.backbone, slots, len(requests), **settings)


@dataclass
class EngineRun:
    """What one run of the engine took.

    Attributes:
        seconds: in all; vision_seconds: of them, encoding.
        turn_seconds: [stream][turn], from where a turn began to where the next one did.
        chunks_encoded: by the tower.
        kv_copied: bytes of keys and values that the engine says it copied; None for the one-step engine, which does not count.
    """

    logs: list[StreamLog]
    seconds: float = 0.0
    vision_seconds: float = 0.0
    turn_seconds: list[list[float]] = field(default_factory=list)
    chunks_encoded: int = 0
    kv_copied: int | None = None

    @property
    def sampled(self) -> int:
        return sum(int(log.sampled.sum()) for log in self.logs)

    @property
    def prefilled(self) -> int:
        return sum(int((~np.isin(log.kind, GENERATED)).sum()) for log in self.logs)

    def turn_ms(self, turns: slice) -> np.ndarray:
        """Milliseconds of these turns of all streams."""
        return 1e3 * np.concatenate([np.asarray(seconds)[turns] for seconds in self.turn_seconds])


def step_through(engine: Engine | OneStepEngine, requests: Sequence[StreamRequest]) -> EngineRun:
    """Run these streams together to their end."""
    writers = [engine.add(request) for request in requests]
    starts: list[list[float]] = [[] for _ in writers]
    made: dict[str, StreamLog] = {}
    began = time.perf_counter()
    while engine.busy:
        before = time.perf_counter()
        for log in engine.step():
            made[log.header.stream_id] = log
        for writer, begun in zip(writers, starts, strict=True):
            if writer.turn >= len(begun):
                begun.append(before)
    _synchronise(engine.backbone.device)
    ended = time.perf_counter()
    run = EngineRun([made[request.header.stream_id] for request in requests], ended - began)
    run.turn_seconds = [np.diff([*begun, ended]).tolist() for begun in starts]
    run.kv_copied = getattr(engine.pool, "copied_bytes", None)
    return run


def run_engine(
    world: World,
    prompts: Sequence[int],
    *,
    engine_type: type = Engine,
    settings: Mapping[str, Any] | None = None,
    encode_per_stream: bool = False,
    **streams: Any,
) -> EngineRun:
    """Encode and run the groups of these prompts together. streams: as `World.requests` takes them.

    settings: of the engine, beside its defaults.
    encode_per_stream: the tower encodes every chunk once per stream, as without sharing.
    """
    empty = [[torch.empty(0)] * world.chunks] * len(prompts)
    shape = list(world.requests(prompts, empty, **streams))
    engine = make_engine(world, shape, engine_type=engine_type, **(settings or {}))
    encode = world.backbone.encoding
    encoded = 0

    def counting(frames: np.ndarray, **given: Any) -> ClipEncoding:
        nonlocal encoded
        encoded += len(frames)
        return encode(frames, **given)

    with mock.patch.object(world.backbone, "encoding", counting):
        began = time.perf_counter()
        for _ in range(world.preset.group if encode_per_stream else 1):
            features = world.encode(prompts)
        _synchronise(world.backbone.device)
        vision = time.perf_counter() - began
        run = step_through(engine, list(world.requests(prompts, features, **streams)))
    run.seconds += vision
    run.vision_seconds, run.chunks_encoded = vision, encoded
    return run


def run_copy_evict(
    world: World,
    prompts: Sequence[int],
    *,
    share_vision: bool = False,
    temperature: float = 1.0,
    chunks: int | None = None,
) -> tuple[list[Generated], float]:
    """Run these prompts' groups one after the other; returns what each wrote, and the seconds of all."""
    baseline = CopyEvict(world.backbone, world.preset.window, PATCH_SECONDS, share_vision=share_vision)
    stop = chunks or world.chunks
    began = time.perf_counter()
    made = [
        baseline.run(world.turns[p][:stop], world.clips[p][:stop], world.preset.group, temperature=temperature, seed=p)
        for p in prompts
    ]
    return made, time.perf_counter() - began


def written(log: StreamLog) -> list[list[int]]:
    """Ids that each turn of a log generated."""
    generated = np.isin(log.kind, GENERATED)
    return [log.ids[generated & (log.turn == turn)].tolist() for turn in range(log.num_turns)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

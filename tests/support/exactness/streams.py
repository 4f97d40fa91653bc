"""Random streams that exercise every edge, and how they are run and scored again.

Invariants: a stream is a function of its name, its turns and its policy; every slot comes back.
"""

from __future__ import annotations

import numpy as np
import torch

from rollout.decode.sampler import stream_seed
from rollout.engine.engine import Engine
from rollout.engine.request import StreamRequest
from streams.backbone.backbone import Backbone
from streams.log.record import NEVER, ChunkRecord, LogHeader, StreamLog
from streams.memory import MemoryConfig, knobs, make_policy
from streams.scoring.logprobs import behaviour_differences
from streams.writing.writer import QueryInput, TurnInput

QUERIES = (
    "What colour is the shape now?",
    "Say when it appears.",
    "yes?",
    "How many shapes are there? Which is first?",
)
GRIDS = ((1, 1, 1), (1, 2, 2), (1, 1, 2), (1, 2, 1), (2, 2, 2))


def chunk_record(turn: int, grid: tuple[int, int, int], keep: tuple[int, ...] | None = None) -> ChunkRecord:
    """Return a chunk of one second whose temporal patches hold two frames each."""
    frames = 2 * grid[0]
    times = turn + (np.arange(frames) + 0.5) / frames
    patches = times.reshape(grid[0], 2).mean(axis=1)
    return ChunkRecord(
        turn, "clip.mp4", tuple(times.tolist()), grid, "clip", keep=keep, patch_times=tuple(patches.tolist())
    )


def random_turns(backbone: Backbone, rng: np.random.Generator, count: int) -> tuple[TurnInput, ...]:
    """Return uneven turns: some text-only, grids of several shapes, late, doubled, staying and unanswered queries."""
    turns = []
    for turn in range(count):
        chunk = None
        if turn == 0 or rng.random() > 0.15:
            grid = GRIDS[rng.integers(len(GRIDS))]
            chunk = chunk_record(turn, grid)
        query = None
        if rng.random() < 0.25:
            until = None if rng.random() < 0.6 else int(rng.choice([turn + 2, NEVER]))
            ids = backbone.layout.query_ids(str(rng.choice(QUERIES)))
            query = QueryInput(tuple(ids), until)
        turns.append(TurnInput(chunk, query, (turn / 2, turn / 2 + 0.5)))
    return tuple(turns)


def stream_header(backbone: Backbone, memory: MemoryConfig, name: str, temperature: float = 1.0) -> LogHeader:
    """Return the header of a stream whose task, seed and id come from its name."""
    return LogHeader(
        stream_id=name,
        task_id=name,
        backbone=backbone.name,
        policy=memory.name,
        policy_knobs=knobs(memory),
        position_convention=backbone.position_convention,
        banned=backbone.layout.banned,
        seed=stream_seed(0, name),
        temperature=temperature,
        score_temperature=temperature or 1.0,
    )


def request(
    backbone: Backbone,
    memory: MemoryConfig,
    turns: tuple[TurnInput, ...],
    name: str,
    *,
    temperature: float = 1.0,
    feature_seed: int | None = None,
) -> StreamRequest:
    """Return the request for a stream over `turns` with random features, equal for equal feature seeds."""
    generator = torch.Generator().manual_seed(stream_seed(0, name) % 2**31 if feature_seed is None else feature_seed)
    features = tuple(
        torch.randn(t.chunk.num_tokens, backbone.feature_width, generator=generator, dtype=torch.float64).to(
            device=backbone.device, dtype=backbone.dtype
        )
        for t in turns
        if t.chunk is not None
    )
    header = stream_header(backbone, memory, name, temperature)
    return StreamRequest(header, turns, features, make_policy(memory), backbone.layout, patch_seconds=0.5)


def random_requests(
    backbone: Backbone, memory: MemoryConfig, count: int, seed: int = 0, low: int = 5, high: int = 14
) -> list[StreamRequest]:
    """Return requests for streams of `low` to `high` - 1 random turns."""
    rng = np.random.default_rng(seed)
    return [
        request(backbone, memory, random_turns(backbone, rng, int(rng.integers(low, high))), f"{memory.name}{seed}/{i}")
        for i in range(count)
    ]


def run(
    backbone: Backbone,
    requests: list[StreamRequest],
    max_streams: int = 16,
    *,
    kv_slots: int = 20000,
    engine_type: type[Engine] = Engine,
) -> list[StreamLog]:
    """Run the streams to their end and check that every slot came back. Returns logs in the order of the requests."""
    engine = engine_type(backbone, kv_slots=kv_slots, max_streams=max_streams)
    for r in requests:
        engine.add(r)
    done = {}
    while engine.busy:
        for log in engine.step():
            done[log.header.stream_id] = log
    assert engine.pool.available == engine.pool.capacity
    return [done[r.header.stream_id] for r in requests]


def joined_features(r: StreamRequest) -> torch.Tensor:
    return torch.cat(list(r.features))


def signed_differences(
    backbone: Backbone, logs: list[StreamLog], requests: list[StreamRequest], attention: str = "sdpa"
) -> np.ndarray:
    """Return re-scored minus behaviour log-prob of every sampled token, log by log; float64 [N]."""
    features = [joined_features(r) for r in requests]
    return np.concatenate(behaviour_differences(backbone, logs, features, attention=attention))


def differences(backbone: Backbone, logs: list[StreamLog], requests: list[StreamRequest]) -> np.ndarray:
    """Return the absolute values of `signed_differences`."""
    return np.abs(signed_differences(backbone, logs, requests))


FP64_BAR = 1e-10
"""Largest difference of log-probs in fp64 between engine and learner that is rounding."""
CAUGHT = 1000 * FP64_BAR
"""What a planted defect must exceed."""


def run_to_the_end(engine: Engine) -> None:
    """Step the engine until nothing is left to do."""
    while engine.busy:
        engine.step()

"""Shared by the engine tests: tiny backbones with loud weights, and random streams that exercise every edge.

Loud weights (Xavier gain 2, embeddings of std 1) matter: with default initialisation real mask defects hide under 1e-4.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from rollout.engine import Engine, StreamRequest
from rollout.sampler import stream_seed
from streams.backbone import Backbone
from streams.layout import Layout, LayoutConfig
from streams.log import NEVER, ChunkRecord, Kind, LogHeader, StreamLog
from streams.memory import MemoryConfig, knobs, make_policy
from streams.tiny import build_tiny
from streams.tiny_spec import QWEN3_SPEC, TinySpec
from streams.writer import QueryInput, TurnInput

QUERIES = (
    "What colour is the shape now?",
    "Say when it appears.",
    "yes?",
    "How many shapes are there? Which is first?",
)
GRIDS = ((1, 1, 1), (1, 2, 2), (1, 1, 2), (1, 2, 1), (2, 2, 2))


# Heads of Qwen3-VL are wider than hidden / heads, as in its real checkpoints.
SPECS = {"qwen2_5_vl": TinySpec(), "qwen3_vl": replace(QWEN3_SPEC, head_dim=48)}
MODEL_TYPES = tuple(SPECS)

WORDS = ("red", "green", "nothing", " answer", "\n", "\n\n", " red", ".")


def loud_backbone(
    folder: Path, dtype: torch.dtype, spec: TinySpec | str = "qwen2_5_vl", layout: LayoutConfig | None = None
) -> Backbone:
    """A loud tiny backbone that may only write a few words and the layout's tokens.

    With the whole vocabulary open, random weights hardly ever end a turn or decide anything by themselves.
    """
    spec = SPECS[spec] if isinstance(spec, str) else spec
    path = build_tiny(folder / "loud", spec, seed=7, gain=2.0, std=1.0)
    config = layout or LayoutConfig(think_budget=5, max_new_tokens=10)
    backbone = Backbone.load(path, config, dtype=dtype)
    tokens = backbone.layout.tokens
    allowed = {tokens.im_end, tokens.silent, tokens.response, tokens.think, tokens.think_end}
    allowed |= {token for word in WORDS for token in backbone.tokenizer.encode(word)}
    backbone.layout.banned = tuple(i for i in range(backbone.layout.vocab_rows) if i not in allowed)
    return Backbone(backbone.model, backbone.tokenizer, backbone.layout, backbone.image, path, backbone.processors)


@contextmanager
def norms_in_input_dtype():
    """Qwen's RMSNorm computes in fp32 whatever its input: for fp64 proofs it computes in the input's dtype.

    Qwen3-VL's class also normalises queries and keys.
    """
    classes = (Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm)
    before = [norm.forward for norm in classes]

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in classes:
        norm.forward = forward
    try:
        yield
    finally:
        for norm, original in zip(classes, before, strict=True):
            norm.forward = original


def chunk_record(turn: int, grid: tuple[int, int, int], keep: tuple[int, ...] | None = None) -> ChunkRecord:
    """A chunk of one second whose temporal patches hold two frames each."""
    frames = 2 * grid[0]
    times = turn + (np.arange(frames) + 0.5) / frames
    patches = times.reshape(grid[0], 2).mean(axis=1)
    return ChunkRecord(
        turn, "clip.mp4", tuple(times.tolist()), grid, "clip", keep=keep, patch_times=tuple(patches.tolist())
    )


def random_turns(backbone: Backbone, rng: np.random.Generator, count: int) -> tuple[TurnInput, ...]:
    """Uneven turns: some text-only, grids of several shapes, late, doubled, staying and unanswered queries."""
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


def request(
    backbone: Backbone,
    memory: MemoryConfig,
    turns: tuple[TurnInput, ...],
    name: str,
    *,
    temperature: float = 1.0,
    feature_seed: int | None = None,
) -> StreamRequest:
    """A stream over `turns` with random features, the same ones for the same feature seed."""
    generator = torch.Generator().manual_seed(stream_seed(0, name) % 2**31 if feature_seed is None else feature_seed)
    features = tuple(
        torch.randn(t.chunk.num_tokens, backbone.feature_width, generator=generator, dtype=torch.float64).to(
            backbone.dtype
        )
        for t in turns
        if t.chunk is not None
    )
    header = LogHeader(
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
    return StreamRequest(header, turns, features, make_policy(memory), backbone.layout, patch_seconds=0.5)


def run(backbone: Backbone, requests: list[StreamRequest], max_streams: int = 16) -> list[StreamLog]:
    """Run to the end; logs in the order of the requests. Checks that every slot came back."""
    engine = Engine(backbone, kv_slots=20000, max_streams=max_streams)
    for r in requests:
        engine.add(r)
    done = {}
    while engine.busy:
        for log in engine.step():
            done[log.header.stream_id] = log
    assert engine.pool.available == engine.pool.capacity
    return [done[r.header.stream_id] for r in requests]


def joined_features(r: StreamRequest) -> torch.Tensor:
    return torch.cat(r.features)


def brute_force_expiry(
    log: StreamLog, turns: tuple[TurnInput, ...], memory: MemoryConfig, layout: Layout
) -> np.ndarray:
    """Expiry from the policy's definition, token by token, with no code shared with the writer; int64 [L]."""
    count = log.num_turns
    start = [int(np.flatnonzero(log.turn == t)[0]) for t in range(count)]
    spoken = [i for i in range(len(log)) if log.kind[i] in (Kind.THINK, Kind.DECISION, Kind.RESPONSE)]
    budgeted = budget_expiry(turns[:count], memory.video_tokens) if memory.name == "visual_budget" else {}
    text_turns = {
        "rcsm": memory.text_window or NEVER,
        "recent_frames": memory.window,
        "sink_window": memory.text_window,
    }.get(memory.name, NEVER)

    def start_of(turn: int) -> int:
        return start[turn] if turn < count else NEVER

    def nth_video_turn_after(turn: int, n: int) -> int:
        later = [t for t in range(turn + 1, count) if turns[t].chunk is not None]
        return start[later[n - 1]] if len(later) >= n else NEVER

    def closing_turn(turn: int) -> int:
        """The last turn in which the query of `turn` is open."""
        closes = turns[turn].query.until_turn
        if closes is None:
            closes = next((t for t in range(turn, count) if responded[t]), NEVER)
        return closes

    def outside_sink_and_tail(i: int, turn: int) -> int:
        """The first turn by which a generated token has left the text window and is neither sink nor tail."""
        ordinal = spoken.index(i)
        for t in range(turn + memory.text_window, count):
            gone = sum(int(log.turn[j]) <= t - memory.text_window for j in spoken)
            if memory.sink_tokens <= ordinal < gone - memory.tail_tokens:
                return start[t]
        return NEVER

    def end_of_lane_one(turn: int) -> int:
        copied = np.flatnonzero((log.turn == turn) & (log.kind == Kind.MEMORY))
        return int(copied[0]) if len(copied) else start_of(turn + 1)

    def unlucky(i: int, turn: int) -> int:
        for t in range(turn + 1, count):
            drawn = np.random.default_rng([memory.seed, t]).random(i + 1)[i] < memory.rate
            if drawn and not (log.kind[i] == Kind.QUERY and closing_turn(turn) >= t):
                return start[t]
        return NEVER

    responded = [
        bool(((log.turn == t) & (log.ids == layout.tokens.response) & (log.kind == Kind.DECISION)).any())
        for t in range(count)
    ]
    expiry = np.full(len(log), NEVER, np.int64)
    for i in range(len(log)):
        kind, turn = Kind(int(log.kind[i])), int(log.turn[i])
        if memory.name == "random":
            expiry[i] = unlucky(i, turn)
        elif memory.name == "full" or kind == Kind.SYSTEM:
            continue
        elif memory.name == "text_memory":
            expiry[i] = NEVER if kind in (Kind.QUERY, Kind.MEMORY) else end_of_lane_one(turn)
        elif kind == Kind.VIDEO:
            last = start_of(budgeted.get(turn, NEVER))
            expiry[i] = last if memory.name == "visual_budget" else nth_video_turn_after(turn, memory.window)
        elif kind == Kind.QUERY:
            if text_turns != NEVER and closing_turn(turn) < count:
                expiry[i] = max(start_of(closing_turn(turn) + 1), start_of(turn + text_turns))
        elif memory.name == "sink_window" and i in spoken:
            expiry[i] = outside_sink_and_tail(i, turn)
        else:
            expiry[i] = start_of(turn + text_turns)
    return expiry


def budget_expiry(turns: tuple[TurnInput, ...], budget: int) -> dict[int, int]:
    """turn of a chunk -> turn at which it leaves, by doing what the rule says: the oldest go until the new one fits."""
    kept: list[tuple[int, int]] = []
    leaves = {}
    for turn, shown in enumerate(turns):
        if shown.chunk is None:
            continue
        while kept and sum(size for _, size in kept) + shown.chunk.num_tokens > budget:
            leaves[kept.pop(0)[0]] = turn
        kept.append((turn, shown.chunk.num_tokens))
    return leaves

"""Shared by the engine tests: tiny backbones with loud weights, and random streams that exercise every edge.

Loud weights (Xavier gain 2, embeddings of std 1) matter: with default initialisation real mask defects hide under 1e-4.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from rollout.engine import Engine, StreamRequest
from rollout.sampler import stream_seed
from streams.backbone import Backbone
from streams.layout import Layout, LayoutConfig
from streams.log import NEVER, ChunkRecord, Kind, LogHeader, StreamLog
from streams.memory import MemoryConfig, knobs, make_policy
from streams.tiny import build_tiny
from streams.writer import QueryInput, TurnInput

QUERIES = (
    "What colour is the shape now?",
    "Say when it appears.",
    "yes?",
    "How many shapes are there? Which is first?",
)
GRIDS = ((1, 1, 1), (1, 2, 2), (1, 1, 2), (1, 2, 1), (2, 2, 2))


WORDS = ("red", "green", "nothing", " answer", "\n", "\n\n", " red", ".")


def loud_backbone(folder: Path, dtype: torch.dtype, layout: LayoutConfig | None = None) -> Backbone:
    """A loud tiny backbone that may only write a few words and the layout's tokens.

    With the whole vocabulary open, random weights hardly ever end a turn or decide anything by themselves.
    """
    path = build_tiny(folder / "loud", seed=7, gain=2.0, std=1.0)
    config = layout or LayoutConfig(think_budget=5, max_new_tokens=10)
    backbone = Backbone.load(path, config, dtype=dtype)
    tokens = backbone.layout.tokens
    allowed = {tokens.im_end, tokens.silent, tokens.response, tokens.think, tokens.think_end}
    allowed |= {token for word in WORDS for token in backbone.tokenizer.encode(word)}
    backbone.layout.banned = tuple(i for i in range(backbone.layout.vocab_rows) if i not in allowed)
    return Backbone(backbone.model, backbone.tokenizer, backbone.layout, backbone.image, path)


@contextmanager
def norms_in_input_dtype():
    """Qwen's RMSNorm computes in fp32 whatever its input: for fp64 proofs it computes in the input's dtype."""
    before = qwen.Qwen2_5_VLRMSNorm.forward

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    qwen.Qwen2_5_VLRMSNorm.forward = forward
    try:
        yield
    finally:
        qwen.Qwen2_5_VLRMSNorm.forward = before


def random_turns(backbone: Backbone, rng: np.random.Generator, count: int) -> tuple[TurnInput, ...]:
    """Uneven turns: some text-only, grids of several shapes, late, doubled, staying and unanswered queries."""
    turns = []
    for turn in range(count):
        chunk = None
        if turn == 0 or rng.random() > 0.15:
            grid = GRIDS[rng.integers(len(GRIDS))]
            chunk = ChunkRecord(turn, "clip.mp4", (float(turn), turn + 0.5), grid, "clip")
        query = None
        if rng.random() < 0.25:
            until = None if rng.random() < 0.6 else int(rng.choice([turn + 2, NEVER]))
            ids = backbone.layout.query_ids(str(rng.choice(QUERIES)))
            query = QueryInput(tuple(ids), until)
        turns.append(TurnInput(chunk, query))
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
    width = backbone.model.config.text_config.hidden_size
    features = tuple(
        torch.randn(t.chunk.num_tokens, width, generator=generator, dtype=torch.float64).to(backbone.dtype)
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

    def start_of(turn: int) -> int:
        return start[turn] if turn < count else NEVER

    def nth_video_turn_after(turn: int, n: int) -> int:
        later = [t for t in range(turn + 1, count) if turns[t].chunk is not None]
        return start[later[n - 1]] if len(later) >= n else NEVER

    responded = [
        bool(((log.turn == t) & (log.ids == layout.tokens.response) & (log.kind == Kind.DECISION)).any())
        for t in range(count)
    ]
    expiry = np.full(len(log), NEVER, np.int64)
    for i in range(len(log)):
        kind, turn = Kind(int(log.kind[i])), int(log.turn[i])
        if memory.name == "full" or kind == Kind.SYSTEM:
            continue
        if kind == Kind.VIDEO:
            expiry[i] = nth_video_turn_after(turn, memory.window)
        elif memory.name == "recent_frames" and kind == Kind.QUERY:
            query = turns[turn].query
            closes = query.until_turn
            if closes is None:
                closes = next((t for t in range(turn, count) if responded[t]), NEVER)
            if closes < count:
                expiry[i] = max(start_of(closes + 1), start_of(turn + memory.window))
        elif memory.name == "recent_frames":
            expiry[i] = start_of(turn + memory.window)
    return expiry

"""Shared by the engine tests: loud backbones and random streams (tests.support.exactness), and the policies by brute force."""

from __future__ import annotations

import numpy as np

from streams.layout.layout import Layout
from streams.log.record import NEVER, Kind, StreamLog
from streams.memory import MemoryConfig
from streams.writing.writer import TurnInput
from tests.support.exactness.backbones import MODEL_TYPES, SPECS, loud_backbone, norms_in_input_dtype
from tests.support.exactness.streams import (
    CAUGHT,
    FP64_BAR,
    GRIDS,
    QUERIES,
    chunk_record,
    differences,
    joined_features,
    random_requests,
    random_turns,
    request,
    run,
    run_to_the_end,
)

__all__ = [
    "CAUGHT",
    "FP64_BAR",
    "GRIDS",
    "MODEL_TYPES",
    "QUERIES",
    "SPECS",
    "brute_force_expiry",
    "budget_expiry",
    "chunk_record",
    "differences",
    "joined_features",
    "loud_backbone",
    "norms_in_input_dtype",
    "random_requests",
    "random_turns",
    "request",
    "run",
    "run_to_the_end",
]


def brute_force_expiry(
    log: StreamLog, turns: tuple[TurnInput, ...], memory: MemoryConfig, layout: Layout
) -> np.ndarray:
    """Return the expiry by the policy's definition, int64 [L], token by token, with no code shared with the writer."""
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
        """Return the last turn in which the query of `turn` is open."""
        closes = turns[turn].query.until_turn
        if closes is None:
            closes = next((t for t in range(turn, count) if responded[t]), NEVER)
        return closes

    def outside_sink_and_tail(i: int, turn: int) -> int:
        """Return where the first turn starts by which a generated token is outside text window, sink and tail."""
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
    """Return turn of a chunk -> turn at which it leaves, following the rule: the oldest leave until the new one fits."""
    kept: list[tuple[int, int]] = []
    leaves = {}
    for turn, shown in enumerate(turns):
        if shown.chunk is None:
            continue
        while kept and sum(size for _, size in kept) + shown.chunk.num_tokens > budget:
            leaves[kept.pop(0)[0]] = turn
        kept.append((turn, shown.chunk.num_tokens))
    return leaves

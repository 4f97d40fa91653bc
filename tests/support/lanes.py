"""Lanes, positions and copies of a log from their definitions, token by token, with no code shared with the writer."""

from __future__ import annotations

import math

import numpy as np

from streams.layout.layout import Layout
from streams.log.record import Kind, StreamLog
from streams.memory import Lanes, LiveTokens, MemoryConfig, MemoryPolicy, TurnStart
from streams.writing.writer import TurnInput


def brute_force_lanes(log: StreamLog, memory: MemoryConfig) -> np.ndarray:
    """Return the lane of every token, int [L]: 1 under text_memory except for system message, queries and copies; else 0."""
    above = (Kind.SYSTEM, Kind.QUERY, Kind.MEMORY)
    return np.array([int(memory.name == "text_memory" and kind not in above) for kind in log.kind])


def brute_force_positions(log: StreamLog, turns: tuple[TurnInput, ...], lane: np.ndarray, layout: Layout) -> np.ndarray:
    """Return Qwen2.5-VL's positions, int [3, L], at two positions a second and a second between patches."""
    positions = np.zeros((3, len(log)), np.int64)
    above, here = 0, 0
    cells: list[tuple[int, int, int]] = []
    for i, kind in enumerate(log.kind):
        if lane[i] and (not lane[i - 1] or log.turn[i - 1] != log.turn[i]):
            here = above
        now = here if lane[i] else above
        if kind == Kind.VIDEO:
            positions[:, i] = cells.pop(0)
            continue
        positions[:, i] = now
        now += 1
        if log.ids[i] == layout.tokens.vision_start:
            chunk = turns[log.turn[i]].chunk
            t, h, w = chunk.grid
            grid = [(now + 2 * a, now + b, now + c) for a in range(t) for b in range(h) for c in range(w)]
            cells = [cell for n, cell in enumerate(grid) if chunk.keep is None or n in chunk.keep]
            now += max(2 * (t - 1), h - 1, w - 1) + 1
        if lane[i]:
            here = now
        else:
            above = now
    assert not cells
    return positions


def brute_force_copy(log: StreamLog, turn: int, turns: tuple[TurnInput, ...], layout: Layout) -> list[int]:
    """Return the ids that follow a turn under text_memory."""
    added = set(layout.tokenizer.added_tokens_decoder)
    mine = [(int(i), Kind(int(k))) for i, k, t in zip(log.ids, log.kind, log.turn, strict=True) if t == turn]
    thought = [i for i, kind in mine if kind == Kind.THINK and i not in added]
    answer = [i for i, kind in mine if kind == Kind.RESPONSE and i not in added]
    if (layout.tokens.response, Kind.DECISION) not in mine:
        answer = []
    if turn == log.num_turns - 1 or not thought + answer:
        return []
    time = "\n"
    if turns[turn].span is not None:
        begin, end = (math.floor(s) if s == math.floor(s) else s for s in turns[turn].span)
        time = f"\n[{begin}-{end} s]\n"
    encode = layout.tokenizer.encode
    return [*encode(time), *thought, *(encode("\n[said]\n") if answer else []), *answer]


class LingeringTurns(MemoryPolicy):
    """Lane 1 stays for some turns: lane 0 is then written while lane 1 is live. Each lane counts its own positions."""

    lanes = Lanes.MEMORY

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        lane_one = ~np.isin(live.kind, (Kind.SYSTEM, Kind.QUERY, Kind.MEMORY))
        return lane_one & (live.turn <= start.turn - self.turns)

    def lane_one_begins(self, lane0: int, lane1: int) -> int:
        return lane1

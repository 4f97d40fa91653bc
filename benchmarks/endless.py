"""A stream without end: does an old turn cost what a young one costs, in KV slots, in time, in memory?

    python -m benchmarks.endless [--turns 10000] [--policies rcsm sink_window] [--device cpu|cuda] [--json PATH|-]

A real engine runs a tiny random backbone. Turns are pushed one by one into a turn queue, and the log is written in pieces.
Every turn shows one chunk and generates the same number of tokens (the end is forced). Now and then a query arrives that
a response or its `until` closes. So whatever is not constant comes from age.

Time: a second, young stream runs in the same engine. At the end the old one's last turns and the young one's turns from
100 on are timed alternately, so that whatever else the machine does hits both alike. Exit 1 says that a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import hardware, result_target, versions, write_result
from rollout.engine.engine import Engine
from rollout.engine.feed import TurnFeed
from rollout.engine.request import StreamRequest
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig
from streams.log.pieces import PieceFolder, join_pieces, read_pieces
from streams.log.record import ChunkRecord, Kind
from streams.memory import MemoryConfig, knobs, make_policy
from streams.writing.writer import QueryInput, TurnInput
from tests.support.exactness.streams import stream_header

MEMORIES = {
    "rcsm": MemoryConfig("rcsm", 8, text_window=16),
    "sink_window": MemoryConfig("sink_window", 8, text_window=16, sink_tokens=32, tail_tokens=32),
    "sink_window_contiguous": MemoryConfig(
        "sink_window", 8, text_window=16, sink_tokens=32, tail_tokens=32, positions="contiguous"
    ),
}
SPEC = TinySpec(hidden=64, layers=1, heads=2, kv_heads=1, mlp=128)
LAYOUT = LayoutConfig(system_prompt="Watch.", think_budget=2, max_new_tokens=4)
GRID = (1, 2, 2)
FULL_AFTER = 100
"""Turns after which every window, sink and tail here is full."""
QUERY_EVERY = 20
QUERY_TOKENS = 600
RATIO_BAR, MEMORY_BAR = 0.1, 0.02


@dataclass
class Live:
    """One stream that is pushed turn by turn, and what it held after each."""

    engine: Engine
    request: StreamRequest
    features: torch.Tensor
    held: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    host_bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = self.engine.add(self.request)

    @property
    def feed(self) -> TurnFeed:
        assert isinstance(self.request.turns, TurnFeed)
        return self.request.turns

    def turn(self) -> None:
        """Push the next turn and run it to its end."""
        turn = self.writer.turn + 1
        self.feed.push(turn_input(turn), self.features)
        began = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        self.seconds.append(time.perf_counter() - began)
        failed = self.engine.take_failed()
        if failed:
            raise OSError(f"stream {failed[0].stream_id}: {failed[0].cause}")
        writer = self.writer
        self.host_bytes.append(writer.held.nbytes + writer.log.nbytes)
        kinds = writer.held.column("kind")
        self.queries.append(int((kinds == Kind.QUERY).sum()))
        self.held.append(len(kinds) - self.queries[-1])


def turn_input(turn: int) -> TurnInput:
    """One chunk; every QUERY_EVERY turns a query, by turns one that a response closes and one that time closes."""
    chunk = ChunkRecord(turn, "camera", (turn + 0.25, turn + 0.75), GRID, "camera", patch_times=(turn + 0.5,))
    if turn % QUERY_EVERY:
        return TurnInput(chunk)
    return TurnInput(chunk, QueryInput(tuple(range(65, 75)), turn + 3 if turn % (2 * QUERY_EVERY) else None))


def backbone(folder: Path, device: str = "cpu") -> Backbone:
    """Tiny, and it may not end a turn by itself: then all turns take the same number of steps."""
    made = Backbone.load(build_tiny(folder, SPEC, seed=7), LAYOUT, dtype=torch.float32, device=device)
    layout = made.layout
    tokens = layout.tokens
    words = {tokens.silent, tokens.response, *made.tokenizer.encode("red green blue")}
    layout.banned = tuple(i for i in range(layout.vocab_rows) if i not in words)
    return Backbone(made.model, made.tokenizer, layout, made.image, folder, made.processors)


def live_stream(engine: Engine, memory: MemoryConfig, name: str, folder: Path, piece_tokens: int) -> Live:
    made = engine.backbone
    header = stream_header(made, memory, name)
    largest = turn_input(0).chunk
    assert largest is not None
    features = torch.randn(
        largest.num_tokens, made.feature_width, generator=torch.Generator().manual_seed(0), dtype=made.dtype
    )
    feed = TurnFeed(largest, QUERY_TOKENS)
    request = StreamRequest(
        header, feed, (), make_policy(memory), made.layout, 1.0, PieceFolder(folder / name), piece_tokens
    )
    return Live(engine, request, features.to(made.device))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def process_memory() -> dict[str, int]:
    gc.collect()
    return {"rss": resident_bytes(), "objects": len(gc.get_objects())}


def measure(name: str, turns: int, folder: Path, piece_tokens: int = 4096, device: str = "cpu") -> dict[str, Any]:
    """One policy; `turns` of the old stream, the last block of them in turns with the young one."""
    block = min(1000, turns // 4)
    engine = Engine(backbone(folder / "model", device), kv_slots=4096, max_streams=2)
    old, young = (
        live_stream(engine, MEMORIES[name], f"{name}-{age}", folder, piece_tokens) for age in ("old", "young")
    )
    for _ in range(FULL_AFTER):
        young.turn()
    early: dict[str, int] = {}
    while old.writer.turn + 1 < turns - block:
        old.turn()
        if old.writer.turn + 1 == block:
            early = process_memory()
    for i in range(block):
        for stream in (old, young) if i % 2 else (young, old):
            stream.turn()
    late = process_memory()
    for stream in (old, young):
        stream.feed.close()
    while engine.busy:
        engine.step()
    files = sorted((folder / f"{name}-old").iterdir())
    log = join_pieces(read_pieces(folder / f"{name}-old"))
    held = np.array(old.held)
    old_ms, young_ms = (1e3 * float(np.median(stream.seconds[-block:])) for stream in (old, young))
    return {
        "policy": name,
        "knobs": dict(knobs(MEMORIES[name])),
        "turns": log.num_turns,
        "kv_slots_min": int(held[FULL_AFTER:].min()),
        "kv_slots_max": int(held[FULL_AFTER:].max()),
        "query_slots_max": {"early": max(old.queries[:block]), "late": max(old.queries[-block:])},
        "host_bytes_max": {"early": max(old.host_bytes[:block]), "late": max(old.host_bytes[-block:])},
        "turn_history_bytes": old.writer.history.nbytes,
        "turn_ms": {"young": young_ms, "old": old_ms},
        "ratio": old_ms / young_ms,
        "memory": {"early": early, "late": late},
        "log_tokens": len(log),
        "evicted_tokens": log.evicted_tokens,
        "pieces": len(files),
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "slots_back": engine.pool.available == engine.pool.capacity,
    }


def missed(row: dict[str, Any], *, timed: bool = True) -> list[str]:
    """The bars that a row misses. timed: also those of time and of the process's memory."""
    # Arrays double as they grow: their room depends on where they stood when a piece was cut.
    host, queries = row["host_bytes_max"], row["query_slots_max"]
    bars = {
        "resident KV is not constant": row["kv_slots_min"] == row["kv_slots_max"],
        "slots were not given back": row["slots_back"],
        "live tokens and log take more room": host["late"] <= 2 * host["early"],
        "queries pile up": queries["late"] <= 2 * queries["early"],
        "nothing was evicted": row["evicted_tokens"] > row["log_tokens"] // 2,
    }
    if timed:
        early, late = row["memory"]["early"], row["memory"]["late"]
        bars["an old turn takes another time than a young one"] = abs(row["ratio"] - 1) <= RATIO_BAR
        for what in ("rss", "objects"):
            bars[f"process memory grows ({what})"] = late[what] <= early[what] * (1 + MEMORY_BAR)
    return [f"{row['policy']}: {name}" for name, met in bars.items() if not met]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.endless", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--policies", nargs="+", choices=sorted(MEMORIES), default=sorted(MEMORIES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=result_target, default="", help="a path, or - for standard output")
    given = parser.parse_args(arguments)
    if given.turns < 1000:
        parser.error(f"--turns {given.turns}: at least 1000, or young and old are the same")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    measured: dict[str, Any] = {"device": given.device, "rows": rows, "missed": wrong}
    for name in given.policies:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, given.turns, Path(folder), device=given.device))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for text in missed(rows[-1]):
            wrong.append(text)
            print(text, file=sys.stderr)
        complete = len(rows) == len(given.policies)
        measured |= {"complete": complete, "ok": complete and not wrong}
        # After every policy: a run that is cut off keeps those before.
        if given.json not in ("", "-"):
            write_result(Path(given.json), measured)
    if given.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **measured}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the engine costs beside the model: microseconds of the host per sampled token, and of the draw.

The host's time is the wall time of a whole run (turns begin, tokens are drawn, logs are written) with the model's forward, its
logits and the draw replaced by ready-made answers, divided by the tokens sampled. Engine and one-step engine take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.rollout.presets import PATCH_SECONDS, World
from benchmarks.rollout.ready_made import ready_made
from benchmarks.rollout.runs import make_engine, step_through
from rollout.decode import sampler
from rollout.engine.engine import Engine
from rollout.engine.request import StreamRequest
from streams.log.record import ChunkRecord
from streams.memory import MemoryConfig, make_policy
from streams.writing.writer import TurnInput
from tests.support.exactness.streams import chunk_record, stream_header
from tests.support.one_step import OneStepEngine
from tests.support.one_step.sampler import pick

GRID = (1, 8, 8)
"""Video tokens of a chunk here: 64, whatever the preset."""
MEMORY = MemoryConfig("rcsm", 6, text_window=8)
EARLY, LATE = 20, 1000


class SameFeatures(Sequence[torch.Tensor]):
    """One chunk's features for every turn."""

    def __init__(self, features: torch.Tensor, count: int) -> None:
        self._features, self._count = features, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, turn: Any) -> torch.Tensor:
        return self._features


def _chunk(turn: int) -> ChunkRecord:
    return chunk_record(turn, GRID)


@lru_cache
def _turns(count: int) -> tuple[TurnInput, ...]:
    """Return turns, one like the other; made before the clock starts, as those of a run are."""
    return tuple(TurnInput(_chunk(turn)) for turn in range(count))


def _requests(world: World, streams: int, turns: int) -> list[StreamRequest]:
    backbone = world.backbone
    features = torch.zeros((_chunk(0).num_tokens, backbone.feature_width), dtype=backbone.dtype, device=backbone.device)
    return [
        StreamRequest(
            stream_header(backbone, MEMORY, f"host/{i}"),
            _turns(turns),
            SameFeatures(features, turns),
            make_policy(MEMORY),
            backbone.layout,
            PATCH_SECONDS,
        )
        for i in range(streams)
    ]


def us_per_token(world: World, streams: int, turns: int, engine_type: type = Engine) -> tuple[float, float]:
    """Microseconds per sampled token of so many streams at once: of wall time, and of the thread's CPU time."""
    requests = _requests(world, streams, turns)
    with ready_made(world.backbone, _word(world)):
        engine = make_engine(world, requests, engine_type=engine_type)
        began = time.thread_time()
        run = step_through(engine, requests)
        cpu = time.thread_time() - began
    return 1e6 * run.seconds / run.sampled, 1e6 * cpu / run.sampled


def _word(world: World) -> int:
    return int(world.backbone.tokenizer.encode("red", add_special_tokens=False)[0])


def host(world: World, turns: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds: before and now at 64 and at 256 streams; with `_cpu`, of CPU time.

    turns: of each stream; more than MEMORY holds, so that something leaves in most of them. Where the machine is shared, the
    CPU time says what the other would be on a quiet one.
    """
    cases: dict[str, Callable[[], tuple[float, float]]] = {
        "before": lambda: us_per_token(world, 64, turns, OneStepEngine),
        "now": lambda: us_per_token(world, 64, turns),
        "before_256": lambda: us_per_token(world, 256, turns, OneStepEngine),
        "now_256": lambda: us_per_token(world, 256, turns),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    us_per_token(world, 8, 2)
    us_per_token(world, 8, 2, OneStepEngine)
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case())
    medians = {name: np.median(values, axis=0) for name, values in found.items()}
    return {
        f"{name}{unit}": float(median[i]) for i, unit in enumerate(("", "_cpu")) for name, median in medians.items()
    }


def draw_us(world: World, rows: int = 64, repeats: int = 20) -> dict[str, float]:
    """Microseconds of one draw per token, now and as the one-step engine drew; logits of the preset's vocabulary."""
    device = world.backbone.device
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((rows, world.backbone.layout.vocab_rows), generator=generator).to(device)
    greedy, seeds, indices = np.zeros(rows, bool), np.arange(rows), np.arange(rows) * 7
    tensors = [torch.from_numpy(values).to(device) for values in (greedy, seeds, indices)]
    cases = {
        "now": lambda: sampler.draw(logits, *tensors)[0].cpu(),
        "before": lambda: pick(logits, greedy, seeds.astype(np.uint64), indices.astype(np.uint64)),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            found[name].append(1e6 * (time.perf_counter() - began) / rows)
    return {name: float(np.median(values)) for name, values in found.items()}


class _Aged:
    """Streams in one engine, stepped turn by turn with ready-made answers."""

    def __init__(self, world: World, streams: int, turns: int) -> None:
        requests = _requests(world, streams, turns)
        self._engine = make_engine(world, requests)
        self._writers = [self._engine.add(request) for request in requests]

    @property
    def turn(self) -> int:
        return min(writer.turn for writer in self._writers)

    def next_turn(self) -> float:
        """Milliseconds until all streams have begun one turn more."""
        target = self.turn + 1
        began = time.perf_counter()
        while self.turn < target:
            self._engine.step()
        return 1e3 * (time.perf_counter() - began)


def growth(world: World, streams: int = 8, block: int = 60, late: int = LATE) -> dict[str, float]:
    """Median milliseconds of the host for a turn of young streams (from turn 20) and of old ones (1,000), in turns."""
    with ready_made(world.backbone, _word(world)):
        old, young = (_Aged(world, streams, first + block + 3) for first in (late, EARLY))
        for aged, first in ((old, late), (young, EARLY)):
            while aged.turn < first:
                aged.next_turn()
        found: dict[str, list[float]] = {"early": [], "late": []}
        for i in range(block):
            for name, aged in (("early", young), ("late", old))[:: 1 if i % 2 else -1]:
                found[name].append(aged.next_turn())
    ms = {f"{name}_p50_ms": float(np.percentile(values, 50)) for name, values in found.items()}
    ms |= {f"{name}_p99_ms": float(np.percentile(values, 99)) for name, values in found.items()}
    return ms | {"ratio": ms["late_p50_ms"] / ms["early_p50_ms"]}

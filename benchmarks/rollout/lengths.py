"""What a long stream costs the short ones beside it: a decode step of both, against one of as many rows and keys, all alike.

Were rows padded to the longest, the first would cost as if every stream were the long one. Steps of both engines take turns.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.rollout.presets import PATCH_SECONDS, World
from benchmarks.rollout.runs import make_engine
from rollout.engine.engine import Engine
from rollout.engine.request import StreamRequest
from streams.memory import MemoryConfig, make_policy
from streams.writing.writer import QueryInput, TurnInput
from tests.support.exactness.streams import stream_header

SHORT, STREAMS = 100, 31
LONG = 3400
"""Tokens that a stream has in memory before it generates, and how many short ones there are beside the long one."""
MEMORY = MemoryConfig("full", 1)


def mixed_lengths(world: World, rounds: int = 3) -> dict[str, float]:
    """Return median milliseconds of a decode step of mixed and of even streams, and their ratio."""
    lengths = [SHORT] * STREAMS + [LONG]
    even = [round(sum(lengths) / len(lengths))] * len(lengths)
    found: dict[str, list[float]] = {"mixed": [], "even": []}
    for i in range(rounds + 1):
        engines = {"mixed": _decoding(world, lengths), "even": _decoding(world, even)}
        step = 0
        while all(engine.busy for engine in engines.values()):
            for name in list(engines)[:: 1 if step % 2 else -1]:
                began = time.perf_counter()
                engines[name].step()
                _synchronise(world.backbone.device)
                if i:  # the first round warms up
                    found[name].append(1e3 * (time.perf_counter() - began))
            step += 1
    medians = {f"{name}_ms": float(np.median(values)) for name, values in found.items()}
    return medians | {"ratio": medians["mixed_ms"] / medians["even_ms"]}


def _decoding(world: World, lengths: list[int]) -> Engine:
    """Return an engine whose streams, with about so many tokens in memory, have begun their only turn."""
    word = int(world.backbone.tokenizer.encode("red", add_special_tokens=False)[0])
    requests = [
        StreamRequest(
            stream_header(world.backbone, MEMORY, f"length/{i}"),
            (TurnInput(None, QueryInput((word,) * length)),),
            (),
            make_policy(MEMORY),
            world.backbone.layout,
            PATCH_SECONDS,
        )
        for i, length in enumerate(lengths)
    ]
    engine: Engine = make_engine(world, requests, decode_steps=1)
    for request in requests:
        engine.add(request)
    engine.step()
    return engine


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Streams through an engine that decodes with Triton, in Triton's interpreter, beside the torch backend; prints JSON lines.

    TRITON_INTERPRET=1 python -m tests.support.triton_engine

A process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.attention import triton_kernel
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from streams.backbone.backbone import Backbone
from streams.log.record import StreamLog
from streams.memory import MemoryConfig
from tests.support.recorded_steps import replay_on_pages
from tests.support.streams import loud_backbone, norms_in_input_dtype, random_turns, request

# The interpreter takes its time for every program of a grid.
triton_kernel.SPLITS, triton_kernel.SPLIT_KEYS, triton_kernel.BLOCK_KEYS = 2, 32, 32

MEMORIES = (MemoryConfig("rcsm", 2, text_window=2), MemoryConfig("sink_window", 2, 2, 4, 4, positions="contiguous"))


def logs_of(backbone: Backbone, rollout: RolloutConfig) -> tuple[Engine, dict[str, StreamLog]]:
    """Run a native and a contiguous stream, one greedy, to their ends."""
    engine = Engine(backbone, 600, 2, rollout.attention, rollout.decode_steps, rollout.cuda_graphs)
    rng = np.random.default_rng(2)
    for i, memory in enumerate(MEMORIES):
        engine.add(request(backbone, memory, random_turns(backbone, rng, 3), f"s{i}", temperature=float(i)))
    logs = {}
    while engine.busy:
        logs |= {log.header.stream_id: log for log in engine.step()}
    return engine, logs


def compare(name: str, wanted: dict[str, StreamLog], engine: Engine, found: dict[str, StreamLog]) -> None:
    print(
        json.dumps(
            {
                "case": name,
                "decode": engine.decode_attention.name,
                "steps": engine.graphs.name,
                "paged": engine.pool.paged,
                "sampled": sum(int(log.sampled.sum()) for log in found.values()),
                "evicted": sum(log.evicted_tokens for log in found.values()),
                "same_ids": all(found[s].ids.tolist() == wanted[s].ids.tolist() for s in wanted),
                "logp_difference": max(
                    float(np.abs(found[s].behaviour_logp - wanted[s].behaviour_logp)[wanted[s].sampled].max())
                    for s in wanted
                ),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, norms_in_input_dtype(), pytest.MonkeyPatch.context() as patch:
        backbone = loud_backbone(Path(folder) / "model", torch.float64)
        _, wanted = logs_of(backbone, RolloutConfig(attention="torch", decode_steps=3))
        triton = RolloutConfig(attention="triton", decode_steps=3)
        compare("blocks", wanted, *logs_of(backbone, triton))
        replay_on_pages(patch)
        compare("pages, recorded", wanted, *logs_of(backbone, triton))

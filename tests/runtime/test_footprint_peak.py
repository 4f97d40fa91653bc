"""Estimated peaks beside what was really held, tensor by tensor: a learner over two optimiser steps, a worker's self-check."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.setup import LearnerSetup
from rollout.config import SELF_CHECK_HEAD
from runtime.planning.footprint import learner_footprint, self_check_bytes, trained_numbers
from runtime.planning.stream_size import StreamSize
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.model_shape import ModelGeometry
from streams.layout.layout import LayoutConfig
from streams.log.record import Kind
from streams.memory import MemoryConfig
from streams.messages import GroupPayload
from streams.scoring.logprobs import behaviour_differences
from tests.support.held_bytes import HeldBytes
from tests.support.learner import GRPO, even
from tests.support.streams import joined_features, random_turns, request, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = TinySpec(hidden=256, mlp=1024, layers=4, vocab_rows=4096, tie_embeddings=True, embedding_std=0.1)
LAYOUT = LayoutConfig(think_budget=10, max_new_tokens=20)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """(logs, features of each) of four streams, made once in float32: what they say is not the question here."""
    backbone = Backbone.load(build_tiny(tmp_path_factory.mktemp("streams"), SPEC), LAYOUT)
    rng = np.random.default_rng(0)
    made = [request(backbone, MemoryConfig("rcsm", 2), random_turns(backbone, rng, 9), f"s{i}") for i in range(4)]
    return run(backbone, made), [joined_features(r)[None] for r in made]


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1, "activation_checkpointing": True},
        {"zero_stage": 1, "activation_checkpointing": True, "dtype": "bfloat16"},
        {"zero_stage": 0},
        # Several forwards to a step: gradients are there from the second on.
        {"zero_stage": 1, "activation_checkpointing": True, "micro_batch_tokens": 400},
    ],
    ids=["zero 1", "bfloat16", "zero 0, nothing recomputed", "several micro-batches"],
)
def test_the_peak_of_a_real_learner_is_within_15_percent_of_the_estimate(tmp_path, ranks, streams, settings):
    dtype = getattr(torch, settings.get("dtype", "float32"))
    build_tiny(tmp_path / "model", SPEC, dtype=dtype)
    logs, features = streams
    if dtype == torch.bfloat16:
        # Slow on a CPU: half of the streams.
        logs, features = logs[:2], features[:2]
    items = [
        even(GroupPayload((log,), "features", to_array(seen.to(dtype))), (advantage,))
        for log, seen, advantage in zip(logs, features, (1.0, -1.0, 0.5, -0.5), strict=False)
    ]
    longest = max(len(log) for log in logs)
    config = LearnerConfig(freeze="tower+merger", row_tokens=longest, head_chunk=256, **settings)
    gc.collect()
    geometry = ModelGeometry.read(tmp_path / "model")
    with HeldBytes() as held:
        learner = LearnerEngine(LearnerSetup(str(tmp_path / "model"), LAYOUT, config, 2, 0), ranks)
        gc.collect()
        # What loading takes on the way is gone when training begins.
        held.peak = held.now
        for step in range(2):
            learner.train(step, GRPO, items)
    learner.close()
    # The streams' real lengths: how well those are bounded is not the question here.
    video = int(np.mean([(log.kind == Kind.VIDEO).sum() for log in logs]))
    stream = StreamSize(1, video, longest - video, 0)
    said = learner_footprint(
        geometry,
        config,
        trained_numbers(geometry, config),
        stream,
        len(logs),
        tower_trains=False,
        reference=False,
        flex=False,
        fused=False,
    )
    assert held.peak == pytest.approx(said.total, rel=0.15), said.line()


@pytest.fixture(scope="module")
def stream_of(tmp_path_factory):
    """(memory, log, features) of a stream of so many turns, made once in float32, as above."""
    backbone = Backbone.load(build_tiny(tmp_path_factory.mktemp("stream"), SPEC), LAYOUT)

    made = {}

    def get(turns, memory):
        if (turns, memory.name) not in made:
            wanted = request(backbone, memory, random_turns(backbone, np.random.default_rng(0), turns), "s")
            (log,) = run(backbone, [wanted])
            made[turns, memory.name] = memory, log, joined_features(wanted)
        return made[turns, memory.name]

    return get


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turns", [9, 40])
def test_the_peak_of_a_self_check_is_within_15_percent_of_the_estimate(tmp_path, stream_of, dtype, turns):
    """Short streams are bounded by the logits, long ones by a layer."""
    held, said = checked(tmp_path, dtype, *stream_of(turns, MemoryConfig("rcsm", 2)))
    assert held == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_self_check_with_contiguous_positions_is_bounded_by_the_estimate(tmp_path, stream_of, dtype):
    """Which counts two copies for every token of text."""
    memory = MemoryConfig("sink_window", 2, 3, sink_tokens=4, tail_tokens=5, positions="contiguous")
    held, said = checked(tmp_path, dtype, *stream_of(40, memory))
    assert held <= said <= 2 * held


def checked(folder, dtype, memory, log, features):
    """(bytes that re-scoring one stream held at most, the estimate)."""
    backbone = Backbone.load(build_tiny(folder / "model", SPEC, dtype=dtype), LAYOUT, dtype=dtype)
    features = features.to(dtype)
    gc.collect()
    held = HeldBytes()
    held.ignore(backbone.model.parameters())
    with held:
        behaviour_differences(backbone, [log], [features], head_chunk=SELF_CHECK_HEAD)
    sampled = int(log.sampled.sum())
    # What can be sampled counts as text: the rest of it is small beside the video of a real chunk.
    stream = StreamSize(1, len(log) - sampled, sampled, 0)
    geometry = ModelGeometry.read(folder / "model")
    return held.peak, self_check_bytes(geometry, dtype.itemsize, stream, flex=False, positions=memory.positions)

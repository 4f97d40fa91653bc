"""Engine = learner for every memory policy: random streams in fp64, and planted defects for the policies that
tests/test_exactness.py has no row for.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.log import NEVER, Kind
from streams.memory import POLICIES, MemoryConfig
from tests import test_exactness as exactness
from tests.streams_lib import brute_force_expiry, random_turns, request, run
from tests.test_policies import MEMORIES

FP64_BAR = exactness.FP64_BAR
CAUGHT = exactness.TestPlantedDefects.CAUGHT
fp64 = exactness.fp64

# Chunks of tests.streams_lib have up to 8 tokens.
ROWS = {
    "rcsm_text": MemoryConfig("rcsm", 2, text_window=3),
    "sink_window": MemoryConfig("sink_window", 2, text_window=2, sink_tokens=4, tail_tokens=5),
    "visual_budget": MemoryConfig("visual_budget", video_tokens=10),
}
RANDOM = MemoryConfig("random", seed=3, rate=0.1)


def for_backbone(memory: MemoryConfig, backbone) -> MemoryConfig:
    """The policy as that backbone takes it: text that tells the time of video stays as long as the video."""
    short = memory.text_window and memory.text_window < memory.window
    if backbone.layout.timestamps and "text_window" in memory.takes and short:
        return dataclasses.replace(memory, text_window=memory.window)
    return memory


@st.composite
def streams(draw, backbone, name):
    """Two streams that run and are packed together: one of policy `name`, one of any; some with empty thoughts."""
    made = []
    for i, policy in enumerate((name, draw(st.sampled_from(sorted(POLICIES))))):
        memory = for_backbone(draw(MEMORIES[policy]), backbone)
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        turns = random_turns(backbone, rng, draw(st.integers(1, 8)))
        stream = request(backbone, memory, turns, f"{i}/{rng.integers(1000)}")
        empty = draw(st.booleans())
        layout = backbone.layout.with_config(
            dataclasses.replace(
                backbone.layout.config, force_empty_thoughts=empty, think_budget=draw(st.integers(2, 5))
            )
        )
        made.append((memory, dataclasses.replace(stream, layout=layout)))
    return made


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(data=st.data())
@settings(max_examples=8)
def test_engine_equals_one_masked_forward(fp64, name, data):
    drawn = data.draw(streams(fp64, name))
    requests = [stream for _, stream in drawn]
    logs = run(fp64, requests)
    assert exactness.differences(fp64, logs, requests).max(initial=0.0) <= FP64_BAR
    for (memory, stream), log in zip(drawn, logs, strict=True):
        assert (log.expiry == brute_force_expiry(log, stream.turns, memory, fp64.layout)).all()


@pytest.fixture(scope="module", params=ROWS)
def evicting(request, fp64):
    memory = for_backbone(ROWS[request.param], fp64)
    requests = exactness.streams(fp64, memory, 6, seed=4, low=8)
    logs = run(fp64, requests)
    assert all((log.expiry < len(log)).any() for log in logs), "every stream must have evicted"
    return memory, requests, logs


class TestPlantedDefects(exactness.TestPlantedDefects):
    """The same defects. Off by one: every window, the tail, and the budget by its smallest chunk."""

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_a_window_off_by_one_turn_is_caught(self, fp64, evicting, shift):
        memory, requests, logs = evicting
        for knob in ("window", "text_window", "sink_tokens", "tail_tokens", "video_tokens"):
            if knob in memory.takes:
                wrong = dataclasses.replace(memory, **{knob: getattr(memory, knob) + shift})
                diff = exactness.rescored_with(
                    fp64,
                    logs,
                    requests,
                    lambda log, r, wrong=wrong: brute_force_expiry(log, r.turns, wrong, fp64.layout),
                )
                assert diff.max() > CAUGHT, knob

    def test_a_ban_list_missing_in_the_learner_is_caught(self, fp64, evicting, monkeypatch):
        _, requests, logs = evicting
        monkeypatch.setattr(fp64, "_ban_index", torch.tensor([], dtype=torch.long))
        assert exactness.differences(fp64, logs, requests).max() > CAUGHT


@pytest.fixture(scope="module")
def made(fp64):
    requests = exactness.streams(fp64, RANDOM, 6, seed=5, low=8)
    return requests, run(fp64, requests)


class TestRandomEviction:
    """Whatever left, the recorded expiry gives the engine's log-probs, and no other expiry does."""

    def test_the_recorded_expiry_replayed_is_exact(self, fp64, made):
        requests, logs = made
        left = np.concatenate([log.kind[log.expiry < len(log)] for log in logs])
        assert set(left.tolist()) >= {Kind.SYSTEM, Kind.SCAFFOLD, Kind.VIDEO, Kind.THINK, Kind.END}
        assert exactness.differences(fp64, logs, requests).max() <= FP64_BAR

    def test_a_plain_causal_mask_is_caught(self, fp64, made):
        requests, logs = made
        diff = exactness.rescored_with(fp64, logs, requests, lambda log, r: np.full(len(log), NEVER))
        assert diff.max() > CAUGHT

    def test_a_ban_list_missing_in_the_learner_is_caught(self, fp64, made, monkeypatch):
        requests, logs = made
        monkeypatch.setattr(fp64, "_ban_index", torch.tensor([], dtype=torch.long))
        assert exactness.differences(fp64, logs, requests).max() > CAUGHT

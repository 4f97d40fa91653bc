"""Property: the engine's log-probs are those of one masked forward over its log, for every policy, on both backbones.

Random streams: text-only turns, empty thoughts, windows of one and beyond the stream, uneven turns, late queries, forced
tokens. What the log recorded is the policy's definition, token by token.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.log.record import Kind
from streams.memory import MemoryConfig
from tests.support.strategies import ANY_MEMORY, EVERY_MEMORY, watched
from tests.support.streams import FP64_BAR, brute_force_expiry, differences, random_requests, run

RANDOM = MemoryConfig("random", seed=3, rate=0.1)


@st.composite
def streams(draw, backbone, name):
    """Two streams that run and are packed together: one under the memory `name`, one under any."""
    return [draw(watched(backbone, memory, str(i))) for i, memory in enumerate((EVERY_MEMORY[name], ANY_MEMORY))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.smoke if name == "rcsm" else ()) for name in sorted(EVERY_MEMORY)]
)
@given(data=st.data())
@settings(max_examples=8)
def test_engine_equals_one_masked_forward(fp64, name, data):
    drawn = data.draw(streams(fp64, name))
    requests = [stream for _, stream in drawn]
    logs = run(fp64, requests)
    assert differences(fp64, logs, requests).max(initial=0.0) <= FP64_BAR
    for (memory, stream), log in zip(drawn, logs, strict=True):
        assert (log.expiry == brute_force_expiry(log, stream.turns, memory, fp64.layout)).all()


def test_whatever_left_the_recorded_expiry_gives_the_log_probs(fp64):
    requests = random_requests(fp64, RANDOM, 6, seed=5, low=8)
    logs = run(fp64, requests)
    left = np.concatenate([log.kind[log.expiry < len(log)] for log in logs])
    assert set(left.tolist()) >= {Kind.SYSTEM, Kind.SCAFFOLD, Kind.VIDEO, Kind.THINK, Kind.END}
    assert differences(fp64, logs, requests).max() <= FP64_BAR

"""Random streams for the property tests of engine and learner: any policy, uneven turns, forced tokens, empty thoughts."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

from rollout.engine import StreamRequest
from streams.backbone import Backbone
from streams.memory import POLICIES, MemoryConfig
from tests.streams_lib import random_turns, request
from tests.test_policies import MEMORIES


def for_backbone(memory: MemoryConfig, backbone: Backbone) -> MemoryConfig:
    """The policy as that backbone takes it: text that tells the time of video stays as long as the video."""
    short = memory.text_window and memory.text_window < memory.window
    if backbone.layout.timestamps and "text_window" in memory.takes and short:
        return dataclasses.replace(memory, text_window=memory.window)
    return memory


@st.composite
def layouts(draw, backbone: Backbone):
    """Budgets that force ends of thoughts early or late; or thoughts that are forced empty."""
    config = dataclasses.replace(
        backbone.layout.config, force_empty_thoughts=draw(st.booleans()), think_budget=draw(st.integers(2, 5))
    )
    return backbone.layout.with_config(config)


@st.composite
def watched(draw, backbone: Backbone, policy: str, name: str, turns: int = 8) -> tuple[MemoryConfig, StreamRequest]:
    """One stream of up to `turns` turns under a policy of that name: (its knobs, the stream)."""
    memory = for_backbone(draw(MEMORIES[policy]), backbone)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shown = random_turns(backbone, rng, draw(st.integers(1, turns)))
    stream = request(backbone, memory, shown, f"{name}/{rng.integers(1000)}")
    return memory, dataclasses.replace(stream, layout=draw(layouts(backbone)))


ANY_POLICY = st.sampled_from(sorted(POLICIES))

"""Random streams for the property tests of engine and learner: any policy, uneven turns, forced tokens, empty thoughts."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

from rollout.engine.request import StreamRequest
from streams.backbone.backbone import Backbone
from streams.layout.layout import Layout
from streams.memory import MemoryConfig
from tests.support.policies import MEMORIES
from tests.support.streams import random_turns, request


def for_layout(memory: MemoryConfig, layout: Layout) -> MemoryConfig:
    """Return the policy as that layout accepts it: text that tells the time of video stays as long as the video."""
    short = memory.text_window and memory.text_window < memory.window
    if layout.timestamps and "text_window" in memory.takes and short:
        return dataclasses.replace(memory, text_window=memory.window)
    return memory


def for_backbone(memory: MemoryConfig, backbone: Backbone) -> MemoryConfig:
    """Return the policy as that backbone accepts it."""
    return for_layout(memory, backbone.layout)


@st.composite
def contiguous(draw) -> MemoryConfig:
    """Draw a `sink_window` with contiguous positions."""
    window = draw(st.integers(1, 5) | st.just(40))
    return MemoryConfig(
        "sink_window",
        window,
        window + draw(st.integers(0, 3)),
        sink_tokens=draw(st.integers(0, 12)),
        tail_tokens=draw(st.integers(0, 12)),
        positions="contiguous",
    )


EVERY_MEMORY = {**MEMORIES, "sink_window, contiguous": contiguous()}
"""What a stream may run under: every policy, and `sink_window` also with contiguous positions."""

ANY_MEMORY = st.sampled_from(sorted(EVERY_MEMORY)).flatmap(EVERY_MEMORY.get)


@st.composite
def layouts(draw, backbone: Backbone):
    """Draw budgets that force thoughts to end early or late, or thoughts that are forced empty."""
    config = dataclasses.replace(
        backbone.layout.config, force_empty_thoughts=draw(st.booleans()), think_budget=draw(st.integers(2, 5))
    )
    return backbone.layout.with_config(config)


@st.composite
def watched(
    draw, backbone: Backbone, memories: st.SearchStrategy[MemoryConfig], name: str, turns: int = 8
) -> tuple[MemoryConfig, StreamRequest]:
    """Draw one stream of up to `turns` turns under one of these memories: (its knobs, the stream)."""
    memory = for_backbone(draw(memories), backbone)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shown = random_turns(backbone, rng, draw(st.integers(1, turns)))
    stream = request(backbone, memory, shown, f"{name}/{rng.integers(1000)}")
    return memory, dataclasses.replace(stream, layout=draw(layouts(backbone)))

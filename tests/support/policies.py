"""Memories, turns and writers for property tests that need no model: any policy, any plan, any generated text."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from streams.backbone.tiny import build_tokenizer
from streams.layout.layout import Layout, LayoutConfig
from streams.log.record import NEVER, ChunkRecord, LogHeader
from streams.memory import MemoryConfig, knobs
from streams.writing.writer import QueryInput, StreamWriter, TurnInput

THINK_BUDGET, MAX_NEW = 5, 9


def build_layout(model_type: str = "qwen2_5_vl", **values) -> Layout:
    tokenizer = build_tokenizer(model_type)
    tokenizer.add_tokens(["<silent>", "<response>", "<think>", "</think>"])
    config = LayoutConfig("Hi.", THINK_BUDGET, MAX_NEW, **values)
    return Layout(tokenizer, config, 640, timestamps=model_type == "qwen3_vl")


LAYOUTS = (build_layout(), build_layout(force_empty_thoughts=True))
TIMED_LAYOUTS = (build_layout("qwen3_vl"), build_layout("qwen3_vl", force_empty_thoughts=True))
SMALL = st.integers(1, 6)
WINDOW = SMALL | st.just(40)
MEMORIES = {
    "full": st.just(MemoryConfig("full")),
    "rcsm": st.builds(MemoryConfig, st.just("rcsm"), WINDOW, st.integers(0, 6)),
    "recent_frames": st.builds(MemoryConfig, st.just("recent_frames"), WINDOW),
    "sink_window": st.builds(
        MemoryConfig,
        st.just("sink_window"),
        WINDOW,
        WINDOW,
        sink_tokens=st.integers(0, 12),
        tail_tokens=st.integers(0, 12),
    ),
    "text_memory": st.just(MemoryConfig("text_memory")),
    # The largest chunk below has 8 tokens.
    "visual_budget": st.builds(MemoryConfig, st.just("visual_budget"), video_tokens=st.integers(8, 24)),
    "random": st.builds(
        MemoryConfig, st.just("random"), seed=st.integers(0, 99), rate=st.sampled_from([0.05, 0.3, 1.0])
    ),
}
CHUNKS = [None, (1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 1)]


@st.composite
def shown(draw, turn: int) -> TurnInput:
    grid = draw(st.sampled_from(CHUNKS))
    chunk = None
    if grid is not None:
        cells = range(grid[0] * grid[1] * grid[2])
        keep = draw(st.none() | st.lists(st.sampled_from(cells), unique=True).map(lambda k: tuple(sorted(k))))
        times = tuple(turn * 0.7 + patch * 0.3 for patch in range(grid[0]))
        chunk = ChunkRecord(turn, "v", (0.0, 0.5), grid, keep=keep, patch_times=times)
    query = draw(st.sampled_from(["none", "none", "closing", "until", "always"]))
    until = {"closing": None, "until": turn + draw(st.integers(1, 4)), "always": NEVER}.get(query)
    words = tuple(range(65, 65 + draw(st.integers(1, 4))))
    span = draw(st.none() | st.just((turn / 2, turn / 2 + 0.5)))
    return TurnInput(chunk, None if query == "none" else QueryInput(words, until), span)


@st.composite
def plans(draw) -> tuple[TurnInput, ...]:
    return tuple(draw(shown(turn)) for turn in range(draw(st.integers(1, 14))))


def header(memory: MemoryConfig) -> LogHeader:
    return LogHeader("s", "t", "b", memory.name, knobs(memory), "p", (), 0)


def generate(writer: StreamWriter, layout: Layout, rng: np.random.Generator) -> None:
    """Write one turn as an engine does: forced tokens where they are due, otherwise anything."""
    t = layout.tokens
    choices = [t.think, t.think_end, t.silent, t.response, t.im_end, 65, 66, 67]
    while not writer.state.over:
        forced = writer.forced()
        if forced is None:
            writer.extend_generated([rng.choice(choices)], 0, logps=np.array([-1.0]), target=True)
        else:
            writer.extend_generated([forced], 0)

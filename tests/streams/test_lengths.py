"""The lengths that memory is planned by are upper bounds of what the layout of either family makes, and not loose ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine.feed import KnownTurns, TurnFeed
from streams.backbone.tiny import build_tokenizer
from streams.backbone.vocabulary import add_missing_tokens
from streams.checkpoint.families import FAMILIES
from streams.layout.lanes import Lanes
from streams.layout.layout import Layout, LayoutConfig
from streams.layout.lengths import SPARE, max_copy, max_scaffold
from streams.log.record import ChunkRecord, Kind
from streams.writing.writer import TurnInput

LONGEST_S = 9999.9
"""Two hours and three quarters: the longest stream that the bound of a time is for."""


def build_layout(model_type: str) -> Layout:
    tokenizer = build_tokenizer(model_type)
    add_missing_tokens(tokenizer)
    return Layout(tokenizer, LayoutConfig(), len(tokenizer), FAMILIES[model_type].timestamps)


LAYOUTS = {name: build_layout(name) for name in FAMILIES}
families = st.sampled_from(list(FAMILIES))
times = st.floats(0.0, LONGEST_S).map(lambda seconds: round(seconds, 3))


def chunk(seconds: tuple[float, ...]) -> ChunkRecord:
    return ChunkRecord(0, "a.mp4", (0.0, 1.0), (len(seconds), 1, 2), "a", patch_times=seconds)


def scaffold(layout: Layout, shown: ChunkRecord) -> int:
    return sum(len(part.ids) for part in layout.prefill(shown, None) if part.kind == Kind.SCAFFOLD)


@settings(max_examples=200, deadline=None)
@given(name=families, seconds=st.lists(times, min_size=1, max_size=6))
def test_no_turn_of_either_family_has_more_scaffold(name, seconds):
    layout, patches = LAYOUTS[name], len(seconds)
    assert scaffold(layout, chunk(tuple(seconds))) <= max_scaffold(timestamps=layout.timestamps, patches=patches)


@pytest.mark.parametrize("patches", [1, 2, 5])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_longest_turn_comes_near_the_bound(name, patches):
    layout = LAYOUTS[name]
    bound = max_scaffold(timestamps=layout.timestamps, patches=patches)
    # With a time before every patch, each has its own vision tags: those of the chunk are to spare.
    spare = SPARE + (2 if layout.timestamps else 0)
    assert scaffold(layout, chunk((LONGEST_S,) * patches)) == bound - spare


@settings(max_examples=200, deadline=None)
@given(
    name=families,
    begin=times,
    seconds=st.sampled_from([0.25, 0.5, 1.0, 2.5, 31.0, 124.0]),
    think=st.integers(0, 12),
    answer=st.integers(0, 12),
)
def test_no_copy_of_a_turn_is_longer(name, begin, seconds, think, answer):
    layout = LAYOUTS[name]
    begin = round(begin / seconds) * seconds
    span = (begin, min(begin + seconds, LONGEST_S))
    word = layout.tokenizer.encode("red", add_special_tokens=False)[0]
    ids = np.array(
        [layout.tokens.think, *[word] * think, layout.tokens.think_end, layout.tokens.response, *[word] * answer]
    )
    kinds = np.repeat([Kind.THINK, Kind.DECISION, Kind.RESPONSE], [think + 2, 1, answer])
    part = layout.memory(ids, kinds, span)
    room = len(ids) + 1  # and the end token
    assert (0 if part is None else len(part.ids)) <= max_copy(room)
    assert layout.max_memory(span) <= max_copy(layout.config.max_new_tokens)


@settings(max_examples=50, deadline=None)
@given(name=families, seconds=st.lists(times, min_size=1, max_size=8))
def test_what_the_engine_counts_turn_by_turn_is_within_what_was_planned(name, seconds):
    layout = LAYOUTS[name]
    turns = [TurnInput(chunk((s,)), None, (s, s + 1)) for s in seconds]
    sizes = KnownTurns(turns, []).sizes(layout, Lanes.MEMORY)
    assert sizes.scaffold <= max_scaffold(timestamps=layout.timestamps, patches=1)
    assert sizes.copies <= (len(turns) - 1) * max_copy(layout.config.max_new_tokens)
    fed = TurnFeed(chunk((0.0,)), 10).sizes(layout, Lanes.ONE)
    # A feed has no end, so its times may be longer than any of a planned stream.
    assert sizes.scaffold <= fed.scaffold

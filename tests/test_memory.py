"""Memory policies and the log: what the writer logs is the policy's definition, and the log's invariants hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.layout import Layout, LayoutConfig
from streams.log import NEVER, ChunkRecord, Kind, LogBuilder, LogHeader
from streams.memory import POLICIES, MemoryConfig, knobs, make_policy
from streams.positions import PositionCursor
from streams.tiny import build_tokenizer
from streams.writer import QueryInput, StreamWriter, TurnInput
from tests.streams_lib import brute_force_expiry


@pytest.fixture(scope="module")
def layout():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<silent>", "<response>", "<think>", "</think>"])
    return Layout(tokenizer, LayoutConfig(system_prompt="Hi."), 640)


FULL = MemoryConfig("full")


def header(memory=FULL):
    return LogHeader("s", "t", "b", memory.name, knobs(memory), "p", (), 0)


TURN = st.tuples(
    st.sampled_from([None, (1, 1, 1), (1, 2, 2)]),  # chunk
    st.sampled_from(["none", "closing", "until", "always"]),  # query
    st.integers(1, 4),  # turns that an `until` query stays open
    st.booleans(),  # whether the turn responds
)


@given(
    st.sampled_from(["full", "rcsm", "recent_frames"]),
    st.integers(1, 6),
    st.lists(TURN, min_size=1, max_size=14),
)
@settings(max_examples=150, deadline=None)
def test_logged_expiry_is_the_policys_definition(name, window, plan):
    layout = _layout_once()
    memory = MemoryConfig(name, window)
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    turns = []
    for t, (grid, query, stay, _) in enumerate(plan):
        chunk = None if grid is None else ChunkRecord(t, "v", (0.0, 0.5), grid)
        until = {"closing": None, "until": t + stay, "always": NEVER}.get(query)
        asked = None if query == "none" else QueryInput((65, 66), until)
        turns.append(TurnInput(chunk, asked))
    for turn_input, (_, _, _, responds) in zip(turns, plan, strict=True):
        writer.begin_turn(turn_input, version=0)
        for token in layout.demonstration("red", "green" if responds else None):
            writer.append_generated(token, 0, target=True)
        live = writer.log.column("expiry")[writer.live]
        assert (live == NEVER).all(), "what is live has not expired"
    log = writer.finish()
    assert (log.expiry == brute_force_expiry(log, tuple(turns), memory, layout)).all()
    assert (np.diff(log.turn) >= 0).all()
    assert (np.diff(log.segment) >= 0).all()
    starts = {int(np.flatnonzero(log.segment == s)[0]) for s in range(int(log.segment[-1]) + 1)}
    finite = log.expiry[log.expiry != NEVER]
    assert set(finite.tolist()) <= starts, "expiry is the start of a segment"
    assert (log.kind[log.turn == 0] == Kind.SYSTEM).sum() == len(layout.system_ids)


_LAYOUT = []


def _layout_once():
    if not _LAYOUT:
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<silent>", "<response>", "<think>", "</think>"])
        _LAYOUT.append(Layout(tokenizer, LayoutConfig(system_prompt="Hi."), 640))
    return _LAYOUT[0]


def test_an_open_query_is_pinned_and_leaves_once_answered_and_old(layout):
    memory = MemoryConfig("recent_frames", 2)
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    gone = {}
    for turn in range(8):
        query = QueryInput((65, 66)) if turn == 1 else None
        evicted, _ = writer.begin_turn(TurnInput(ChunkRecord(turn, "v", (0.0,), (1, 1, 1)), query), 0)
        for token in layout.demonstration("red", "red" if turn == 5 else None):
            writer.append_generated(token, 0, target=True)
        if (writer.log.column("kind")[evicted] == Kind.QUERY).any():
            gone[turn] = True
    assert list(gone) == [6], "pinned through turn 5, evicted when turn 6 starts"


def test_text_only_turns_do_not_move_the_video_window(layout):
    memory = MemoryConfig("rcsm", 2)
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    for turn in range(6):
        chunk = ChunkRecord(turn, "v", (0.0,), (1, 2, 2)) if turn in (0, 5) else None
        writer.begin_turn(TurnInput(chunk), 0)
        for token in layout.demonstration("", None):
            writer.append_generated(token, 0, target=True)
    assert (writer.finish().expiry == NEVER).all(), "only two video turns were shown"


class TestLogBuilder:
    def builder(self):
        log = LogBuilder(header())
        log.begin_segment()
        log.append([1, 2, 3], Kind.SCAFFOLD, np.zeros((3, 3)), turn=0, version=0)
        return log

    def test_expiry_is_never_raised(self):
        log = self.builder()
        log.expire(np.array([0]))
        log.begin_segment()
        log.append([4], Kind.SCAFFOLD, np.zeros((3, 1)), turn=1, version=0)
        with pytest.raises(AssertionError, match="never raised"):
            log.expire(np.array([0]))

    def test_expiry_is_lowered_only_to_the_next_segment(self):
        log = self.builder()
        log.expire(np.array([1]))
        assert log.finish().expiry.tolist() == [NEVER, 3, NEVER]

    def test_a_sampled_token_needs_a_log_prob_and_no_other_has_one(self):
        log = self.builder()
        with pytest.raises(AssertionError, match="log-prob"):
            log.append([4], Kind.THINK, np.zeros((3, 1)), turn=0, version=0, sampled=True)
        with pytest.raises(AssertionError, match="log-prob"):
            log.append([4], Kind.THINK, np.zeros((3, 1)), turn=0, version=0, logp=-1.0)

    def test_turns_never_decrease(self):
        log = self.builder()
        log.append([4], Kind.SCAFFOLD, np.zeros((3, 1)), turn=2, version=0)
        with pytest.raises(AssertionError, match="turns never decrease"):
            log.append([4], Kind.SCAFFOLD, np.zeros((3, 1)), turn=1, version=0)

    def test_growth_keeps_what_was_written(self):
        log = LogBuilder(header())
        log.begin_segment()
        for i in range(1000):
            log.append([i], Kind.THINK, np.full((3, 1), i), turn=i, version=i, sampled=True, logp=-float(i))
        finished = log.finish()
        assert finished.ids.tolist() == list(range(1000))
        assert (finished.positions == np.arange(1000)).all()
        assert finished.oldest_version == 0
        assert finished.single_version is None


def test_a_greedy_log_is_marked_untrainable():
    from dataclasses import replace

    assert header().trainable
    assert not replace(header(), temperature=0.0).trainable


@pytest.mark.parametrize(("kwargs", "key"), [({"name": "nope"}, "memory.name"), ({"window": 0}, "memory.window=0")])
def test_impossible_memory_settings_are_refused_by_name(kwargs, key):
    with pytest.raises(ValueError, match=key):
        MemoryConfig(**kwargs)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("window", [1, 3])
def test_reserved_tokens_bound_what_is_ever_live(layout, name, window):
    """The KV pool's reservation: never less than the live tokens plus what one forward may still hold."""
    memory = MemoryConfig(name, window)
    policy = make_policy(memory)
    writer = StreamWriter(header(memory), layout, policy, PositionCursor(2, 1.0))
    chunk = ChunkRecord(0, "v", (0.0,), (1, 2, 2))
    scaffold = sum(len(part.ids) for part in layout.prefill(chunk, None)) - chunk.num_tokens
    ids = layout.demonstration("red green red green", "red")
    bound = policy.max_live_tokens(scaffold + 4 + len(ids), len(layout.system_ids) + 12 * 4, 4, 12)
    for turn in range(12):
        turn_input = TurnInput(ChunkRecord(turn, "v", (0.0,), (1, 2, 2)), QueryInput((65, 66, 67), NEVER))
        evicted, _ = writer.begin_turn(turn_input, 0)
        for token in ids:
            writer.append_generated(token, 0, target=True)
        assert len(writer.live) + len(evicted) <= bound

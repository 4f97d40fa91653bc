"""Every memory policy against its definition, by random streams: what leaves when, and how much is held at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine.request import StreamRequest, stream_bound
from streams.log.record import NEVER, ChunkRecord, Kind
from streams.memory import POLICIES, MemoryConfig, check_text_tells_time, knobs, make_policy
from streams.positions.mrope import PositionCursor
from streams.writing.writer import StreamWriter, TurnInput
from tests.support.lanes import brute_force_copy, brute_force_lanes, brute_force_positions
from tests.support.policies import LAYOUTS, MAX_NEW, MEMORIES, generate, header, plans
from tests.support.streams import brute_force_expiry


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(st.data())
@settings(max_examples=60)
def test_what_is_logged_is_the_policys_definition_and_the_bound_holds(name, data):
    memory, turns = data.draw(MEMORIES[name]), data.draw(plans())
    layout = data.draw(st.sampled_from(LAYOUTS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    policy = make_policy(memory)
    bound = stream_bound(StreamRequest(header(memory), turns, (), policy, layout, 1.0))
    writer = StreamWriter(header(memory), layout, policy, PositionCursor(2, 1.0))
    for turn_input in turns:
        left, prefilled = writer.begin_turn(turn_input, version=0)
        assert prefilled.stop == writer.log.length
        # Slots of what leaves are free only after the forward of what comes.
        assert len(writer.live) + len(left) <= bound
        generate(writer, layout, rng)
        assert len(writer.live) <= bound
        assert (writer.log.column("expiry")[writer.live] == NEVER).all(), "what is live has not expired"
    log = writer.finish()
    assert (log.expiry == brute_force_expiry(log, turns, memory, layout)).all()
    assert (log.lane == brute_force_lanes(log, memory)).all()
    assert (log.positions == brute_force_positions(log, turns, log.lane, layout)).all()
    for turn in range(log.num_turns):
        copied = log.ids[(log.turn == turn) & (log.kind == Kind.MEMORY)].tolist()
        assert copied == (brute_force_copy(log, turn, turns, layout) if name == "text_memory" else [])
    assert (np.diff(log.turn) >= 0).all()
    assert (np.diff(log.segment) >= 0).all()
    changes = np.flatnonzero(np.diff(log.lane) | np.diff(log.turn)) + 1
    assert (np.diff(log.segment)[changes - 1] > 0).all(), "a segment has one lane and one turn"
    starts = {int(np.flatnonzero(log.segment == s)[0]) for s in range(int(log.segment[-1]) + 1)}
    finite = log.expiry[log.expiry != NEVER]
    assert set(finite.tolist()) <= starts, "expiry is the start of a segment"
    assert (log.kind[log.turn == 0] == Kind.SYSTEM).sum() == len(layout.system_ids)


# A chunk has more tokens than a turn generates: a bound that forgets the chunk that leaves cannot pass.
WIDE = (1, 4, 4)
STEADY = {
    "full": (MemoryConfig("full"), False),
    "rcsm": (MemoryConfig("rcsm", 3), False),
    "rcsm_text": (MemoryConfig("rcsm", 3, text_window=4), True),
    "recent_frames": (MemoryConfig("recent_frames", 3), True),
    "sink_window": (MemoryConfig("sink_window", 3, 4, sink_tokens=6, tail_tokens=7), True),
    "text_memory": (MemoryConfig("text_memory"), False),
    "visual_budget": (MemoryConfig("visual_budget", video_tokens=48), False),
}


@pytest.mark.parametrize("name", sorted(STEADY))
def test_the_bound_is_reached_but_for_one_turns_generation(name):
    """Neither a bound that holds because it is huge, nor, for a policy that bounds text, one that grows with the stream."""
    (memory, bounded), layout = STEADY[name], LAYOUTS[0]
    policy = make_policy(memory)
    most = {}
    for length in (12, 40):
        turns = tuple(TurnInput(ChunkRecord(turn, "v", (0.0,), WIDE)) for turn in range(length))
        bound = stream_bound(StreamRequest(header(memory), turns, (), policy, layout, 1.0))
        writer = StreamWriter(header(memory), layout, policy, PositionCursor(2, 1.0))
        held = 0
        for turn_input in turns:
            left, _ = writer.begin_turn(turn_input, 0)
            held = max(held, len(writer.live) + len(left))
            while not writer.state.over:  # as long as a turn can be
                forced, place = writer.forced(), writer.state.count
                said = {1: layout.tokens.think_end, 2: layout.tokens.response}.get(place, 65)
                writer.extend_generated([said if forced is None else forced], 0)
        assert bound - MAX_NEW <= held <= bound
        most[length] = (held, bound)
    assert (most[12] == most[40]) == bounded


def test_a_stream_of_few_turns_reserves_no_more_than_its_tokens():
    large = MemoryConfig("sink_window", 16, 16, sink_tokens=512, tail_tokens=512)
    full = make_policy(MemoryConfig("full")).max_live_tokens(20, 9, 4, 6)
    assert make_policy(large).max_live_tokens(20, 9, 4, 6) == full
    assert make_policy(MemoryConfig("visual_budget", video_tokens=4096)).max_live_tokens(20, 9, 4, 6) == full


def test_a_budget_that_cannot_hold_one_chunk_is_refused_by_key():
    policy = make_policy(MemoryConfig("visual_budget", video_tokens=7))
    assert policy.max_live_tokens(20, 9, 7, 6)
    with pytest.raises(ValueError, match=r"memory\.video_tokens=7 cannot hold one chunk of 8 video tokens: raise it"):
        policy.max_live_tokens(20, 9, 8, 6)


@pytest.mark.parametrize("memory", [MemoryConfig("rcsm", 3, text_window=2), MemoryConfig("sink_window", 3, 2)])
def test_text_that_tells_the_time_of_video_may_not_leave_before_it(memory):
    check_text_tells_time(make_policy(memory), timestamps=False)
    with pytest.raises(ValueError, match=r"2 turns \(memory\.text_window\) but video for memory\.window=3"):
        check_text_tells_time(make_policy(memory), timestamps=True)
    long = MemoryConfig(memory.name, 3, text_window=3)
    check_text_tells_time(make_policy(long), timestamps=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "nope"}, r"memory\.name='nope' is not one of full, .*custom"),
        ({"window": 0}, r"memory\.window=0 must be at least 1"),
        ({"text_window": -1}, r"memory\.text_window=-1 must not be negative"),
        ({"name": "sink_window"}, r"memory\.text_window=0 must be at least 1"),
        ({"name": "sink_window", "text_window": 2, "sink_tokens": -2}, r"memory\.sink_tokens=-2 must not be negative"),
        ({"name": "sink_window", "text_window": 2, "tail_tokens": -2}, r"memory\.tail_tokens=-2 must not be negative"),
        ({"name": "visual_budget"}, r"memory\.video_tokens=0 must be at least"),
        ({"name": "random", "rate": 1.5}, r"memory\.rate=1\.5 must lie in \[0, 1\]"),
        ({"name": "random", "rate": float("nan")}, r"memory\.rate=nan"),
        ({"name": "random", "seed": -1}, r"memory\.seed=-1"),
        ({"name": "custom"}, r"memory\.target='' with memory\.name=custom"),
    ],
)
def test_impossible_settings_are_refused_by_key(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**values)


def test_a_knob_that_the_policy_does_not_take_is_ignored_and_said():
    assert MemoryConfig("rcsm", 3, text_window=5).notes() == []
    assert MemoryConfig("recent_frames", 3).notes() == []
    (note,) = MemoryConfig("full", 3, sink_tokens=4, args={"a": 1}).notes()
    assert note == "note: memory.name=full does not take memory.window=3, memory.sink_tokens=4, memory.args={'a': 1}"
    assert knobs(MemoryConfig("full", 3)) == ()
    assert knobs(MemoryConfig("rcsm", 3)) == (("window", 3), ("text_window", 0))


def test_what_stays_is_said_in_words():
    assert MemoryConfig("rcsm", 3, text_window=5).words == "rcsm, video of the last 3 chunks, text of the last 5 turns"
    assert MemoryConfig("full").words == "full, everything"
    assert len({MemoryConfig(n, 2, 2, video_tokens=4).words for n in POLICIES}) == len(POLICIES)

"""What was in memory at each turn, against a walk over the log token by token, and against the engine's own live list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evals.transcripts.occupancy import lives, turn_memory
from streams.log.builder import LogBuilder
from streams.log.record import GENERATED, Kind, LogHeader, StreamLog
from streams.memory import MemoryConfig
from tests.support.streams import loud_backbone, random_turns, request, run

HEADER = LogHeader("s", "t", "tiny", "random", (), "none", (), 0)
TEXT = tuple(kind for kind in Kind if kind not in (Kind.VIDEO, Kind.SYSTEM))


@st.composite
def logs(draw) -> StreamLog:
    """Turns of any size; before any segment, any live tokens leave."""
    builder = LogBuilder(HEADER)

    def segment(kinds: list[Kind], turn: int) -> None:
        expiry = builder.column("expiry")
        live = np.flatnonzero(expiry > builder.length)
        gone = [i for i in live if draw(st.integers(0, 3)) == 0]
        builder.expire([(int(i), int(i) + 1) for i in gone])
        builder.begin_segment()
        zeros = np.zeros((3, len(kinds)), np.int32)
        builder.append([0] * len(kinds), np.array(kinds, np.int8), zeros, turn=turn, version=0)

    for turn in range(draw(st.integers(1, 6))):
        video = [Kind.VIDEO] * draw(st.integers(0, 3))
        query = [Kind.QUERY] * draw(st.integers(0, 2))
        system = [Kind.SYSTEM] if turn == 0 else []
        segment([*system, Kind.SCAFFOLD, *video, *query], turn)
        # A lane change starts a segment inside a prefill: eviction may stand right before its last token.
        segment([Kind.SCAFFOLD], turn)
        if draw(st.booleans()):
            segment([Kind.THINK, Kind.DECISION, Kind.END], turn)
        if draw(st.booleans()):
            segment([Kind.MEMORY], turn)
    return builder.finish()


def walked(log: StreamLog) -> list[tuple[set[int], int]]:
    """Per turn (indices live at its last prefilled token, tokens evicted for its prefill), one token at a time."""
    found: list[tuple[set[int], int]] = []
    live: set[int] = set()
    waiting = 0
    for q in range(len(log)):
        gone = {k for k in live if log.expiry[k] <= q}
        waiting += len(gone)
        live = (live - gone) | {q}
        if Kind(int(log.kind[q])) in (*GENERATED, Kind.MEMORY):
            continue
        if len(found) == log.turn[q]:
            found.append((set(), 0))
        found[-1] = (set(live), found[-1][1] + waiting)
        waiting = 0
    found[-1] = (found[-1][0], found[-1][1] + waiting)
    return found


@given(logs())
def test_live_and_evicted_tokens_of_every_turn_equal_a_walk_over_the_log(log):
    memory = turn_memory(log)
    assert [m.turn for m in memory] == list(range(log.num_turns))
    for entry, (live, evicted) in zip(memory, walked(log), strict=True):
        wanted = {kind: sum(log.kind[k] == kind for k in live) for kind in Kind}
        assert entry.live == {kind: n for kind, n in wanted.items() if n}
        assert entry.live_tokens == len(live)
        assert entry.evicted == evicted
    assert sum(m.tokens for m in memory) == len(log)
    assert sum(m.evicted for m in memory) == log.evicted_tokens


@given(logs(), st.sampled_from([(Kind.VIDEO,), TEXT, (Kind.QUERY, Kind.SCAFFOLD)]))
def test_lives_tell_how_many_tokens_of_each_turn_are_live_at_every_turn(log, kinds):
    found = lives(log, kinds)
    for origin in range(log.num_turns):
        turns = [turn for turn, _ in found[origin]]
        assert turns == sorted(set(turns))
        for turn, (live, _) in enumerate(walked(log)):
            wanted = sum(log.turn[k] == origin and Kind(int(log.kind[k])) in kinds for k in live)
            told = [n for since, n in found[origin] if since <= turn]
            assert (told[-1] if told else 0) == wanted


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return loud_backbone(tmp_path_factory.mktemp("occupancy"), torch.float32)


@pytest.mark.parametrize("name", ["rcsm", "recent_frames", "full"])
def test_video_in_memory_under_each_policy_is_that_of_the_last_window_of_video_turns(backbone, name):
    window = 3
    turns = random_turns(backbone, np.random.default_rng(4), 9)
    log = run(backbone, [request(backbone, MemoryConfig(name, window), turns, "s0")])[0]
    for entry in turn_memory(log):
        shown = [t.chunk for t in turns[: entry.turn + 1] if t.chunk is not None]
        kept = shown if name == "full" else shown[-window:]
        if name != "full" and turns[entry.turn].chunk is None:
            # A turn without video evicts none.
            continue
        assert entry.video_tokens == sum(chunk.num_tokens for chunk in kept)
    assert (log.evicted_tokens == 0) == (name == "full")

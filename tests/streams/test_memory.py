"""Memory policies and the log: what the writer logs is the policy's definition, and the log's invariants hold."""

from __future__ import annotations

import numpy as np
import pytest

from streams.backbone.tiny import build_tokenizer
from streams.layout.layout import Layout, LayoutConfig
from streams.log.builder import LogBuilder
from streams.log.record import NEVER, ChunkRecord, Kind, LogHeader
from streams.memory import MemoryConfig, knobs, make_policy
from streams.positions.mrope import PositionCursor
from streams.writing.writer import QueryInput, StreamWriter, TurnInput

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def layout():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<silent>", "<response>", "<think>", "</think>"])
    return Layout(tokenizer, LayoutConfig(system_prompt="Hi."), 640)


FULL = MemoryConfig("full")


def header(memory=FULL):
    return LogHeader("s", "t", "b", memory.name, knobs(memory), "p", (), 0)


def test_an_open_query_is_pinned_and_leaves_once_answered_and_old(layout):
    memory = MemoryConfig("recent_frames", 2)
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    gone = {}
    for turn in range(8):
        query = QueryInput((65, 66)) if turn == 1 else None
        before = writer.live
        evicted, _ = writer.begin_turn(TurnInput(ChunkRecord(turn, "v", (0.0,), (1, 1, 1)), query), 0)
        writer.extend_generated(layout.demonstration("red", "red" if turn == 5 else None), 0, target=True)
        if (writer.log.column("kind")[evicted.of(before)] == Kind.QUERY).any():
            gone[turn] = True
    assert list(gone) == [6], "pinned through turn 5, evicted when turn 6 starts"


def test_text_only_turns_do_not_move_the_video_window(layout):
    memory = MemoryConfig("rcsm", 2)
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    for turn in range(6):
        chunk = ChunkRecord(turn, "v", (0.0,), (1, 2, 2)) if turn in (0, 5) else None
        writer.begin_turn(TurnInput(chunk), 0)
        writer.extend_generated(layout.demonstration("", None), 0, target=True)
    assert (writer.finish().expiry == NEVER).all(), "only two video turns were shown"


class TestLogBuilder:
    def builder(self):
        log = LogBuilder(header())
        log.begin_segment()
        log.append([1, 2, 3], Kind.SCAFFOLD, np.zeros((3, 3)), turn=0, version=0)
        return log

    def test_expiry_is_never_raised(self):
        log = self.builder()
        log.expire([(0, 1)])
        log.begin_segment()
        log.append([4], Kind.SCAFFOLD, np.zeros((3, 1)), turn=1, version=0)
        log.expire([(0, 1)])
        with pytest.raises(AssertionError, match="never raised"):
            log.finish()

    def test_expiry_is_lowered_only_to_the_next_segment(self):
        log = self.builder()
        log.expire([(1, 2)])
        assert log.finish().expiry.tolist() == [NEVER, 3, NEVER]

    def test_a_token_with_a_log_prob_was_sampled_and_no_other(self):
        log = self.builder()
        log.append([4, 5], Kind.THINK, np.zeros((3, 2)), turn=0, version=0, logp=np.array([-1.0, np.nan]))
        assert log.column("sampled").tolist() == log.finish().sampled.tolist() == [False] * 3 + [True, False]

    def test_every_token_has_its_own_of_everything(self):
        log = self.builder()
        for wrong in (
            {"positions": np.zeros((3, 1))},
            {"kind": np.zeros(1, np.int8)},
            {"target": np.ones(3, bool)},
            {"logp": np.zeros(1)},
        ):
            given = {"kind": Kind.THINK, "positions": np.zeros((3, 2)), "turn": 0, "version": 0} | wrong
            with pytest.raises(AssertionError):
                log.append([4, 5], **given)
        assert log.length == 3

    def test_turns_never_decrease(self):
        log = self.builder()
        log.append([4], Kind.SCAFFOLD, np.zeros((3, 1)), turn=2, version=0)
        with pytest.raises(AssertionError, match="turns never decrease"):
            log.append([4], Kind.SCAFFOLD, np.zeros((3, 1)), turn=1, version=0)

    def test_growth_keeps_what_was_written(self):
        log = LogBuilder(header())
        log.begin_segment()
        for i in range(1000):
            log.append([i], Kind.THINK, np.full((3, 1), i), turn=i, version=i, logp=-float(i))
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

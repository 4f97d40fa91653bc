"""StreamWriter, which writes a turn in a few array operations, against the same by its definition, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.layout.layout import Layout
from streams.layout.turn_state import TurnState
from streams.log.pieces import join_pieces
from streams.log.record import ChunkRecord, Kind
from streams.memory import MemoryConfig, MemoryPolicy, make_policy
from streams.memory.live import LiveSet
from streams.memory.rows import Rows
from streams.positions.mrope import PositionCursor, TimestampCursor
from streams.writing.writer import StreamWriter, TurnInput
from tests.support.lanes import LingeringTurns
from tests.support.logs import assert_same_log
from tests.support.plain_writer import PlainWriter
from tests.support.policies import LAYOUTS, TIMED_LAYOUTS, header, plans
from tests.support.strategies import EVERY_MEMORY, for_layout

RATES = [(2.0, 1.0), (2.0, 0.5), (1.0, 0.3), (25.0, 0.04)]
"""Positions a second, and seconds between two patches."""


class Pair:
    """One stream by both writers."""

    def __init__(self, memory: MemoryConfig, layout: Layout, rate: tuple[float, float], own: int | None = None) -> None:
        def policy() -> MemoryPolicy:
            return make_policy(memory) if own is None else LingeringTurns(own)

        self.plain = PlainWriter(header(memory), layout, policy(), *rate)
        cursor = TimestampCursor() if layout.timestamps else PositionCursor(*rate)
        self.writer = StreamWriter(header(memory), layout, policy(), cursor)

    def begin(self, shown: TurnInput, version: int) -> None:
        first = len(self.plain.tokens)
        wanted = self.plain.begin_turn(shown, version)
        before = self.writer.live.copy()
        rows, prefilled = self.writer.begin_turn(shown, version)
        assert rows.of(before).tolist() == wanted
        # The copy of the turn before, if there is one, is no part of the prefill.
        mine = [token.index for token in self.plain.tokens[first:] if token.turn == self.plain.turn]
        assert prefilled == slice(mine[0], mine[-1] + 1)
        self.same_memory()

    def generate(self, layout: Layout, rng: np.random.Generator, version: int) -> None:
        """Write a turn in runs of any length: forced tokens where they are due and elsewhere, otherwise anything."""
        t = layout.tokens
        choices = [t.think, t.think_end, t.silent, t.response, t.im_end, 65, 66, 67]
        # What comes next is forced or not whatever the model chose before, so a state of its own can run ahead.
        ahead = TurnState(t, layout.config)
        while not ahead.over:
            ids, logps, target, kinds = [], [], [], []
            for _ in range(rng.integers(1, 9)):
                if ahead.over:
                    break
                forced = ahead.forced()
                ids.append(int(rng.choice(choices)) if forced is None else forced)
                logps.append(-rng.random() if forced is None and rng.random() < 0.7 else np.nan)
                target.append(bool(rng.integers(2)))
                ahead.advance(ids[-1:])
                kinds.append(self.plain.generate(ids[-1], version, logps[-1], target[-1]))
            whole = len(set(target)) == 1
            got = self.writer.extend_generated(
                ids if rng.integers(2) else np.array(ids),
                version,
                logps=None if np.isnan(logps).all() else np.array(logps),
                target=target[0] if whole else np.array(target),
            )
            assert (got.dtype, got.tolist()) == (np.int8, kinds)
            self.same_memory()
        assert self.writer.state == ahead

    def same_memory(self) -> None:
        """What is live, as policies, the engine and the regions see it."""
        live, held = self.plain.live, self.writer.held
        assert self.writer.live.tolist() == [token.index for token in live]
        columns = {
            "kind": [token.kind for token in live],
            "turn": [token.turn for token in live],
            "ids": [token.id for token in live],
            "ordinal": [token.ordinal for token in live],
            "lane": [token.lane for token in live],
        }
        if self.writer.regions is not None:
            columns["position"] = [min(token.position) for token in live]
        for column, wanted in columns.items():
            assert held.column(column).tolist() == wanted, column
        if self.writer.regions is not None:
            keys, positions = self.writer.regions.turned
            assert list(zip(keys.tolist(), positions.tolist(), strict=True)) == self.plain.turned


def write(pair: Pair, layout: Layout, turns: tuple[TurnInput, ...], seed: int, cuts: list[float | None]) -> None:
    """Write the stream, cut into pieces behind some of its turns, and compare all there is."""
    rng = np.random.default_rng(seed)
    pieces = []
    for turn_input, share in zip(turns, cuts, strict=True):
        version = int(rng.integers(3))
        pair.begin(turn_input, version)
        pair.generate(layout, rng, version)
        log = pair.writer.log
        if share is not None:
            pieces.append(log.cut(log.first + round(share * (log.length - log.first))))
    wanted = pair.plain.finish()
    if pieces:
        assert_same_log(join_pieces([*pieces, log.cut(log.length, last=True)]), wanted)
    else:
        assert_same_log(pair.writer.finish(), wanted)


@pytest.mark.parametrize("name", [*sorted(EVERY_MEMORY), "two lanes that linger"])
@given(data=st.data())
@settings(max_examples=60)
def test_the_log_is_that_of_one_token_at_a_time(name, data):
    layout = data.draw(st.sampled_from(LAYOUTS + TIMED_LAYOUTS))
    own = data.draw(st.integers(1, 3)) if name not in EVERY_MEMORY else None
    memory = MemoryConfig("full") if own else for_layout(data.draw(EVERY_MEMORY[name]), layout)
    turns = data.draw(plans())
    share = st.none() | st.sampled_from([0.0, 0.4, 1.0])
    cuts = data.draw(st.just([None] * len(turns)) | st.lists(share, min_size=len(turns), max_size=len(turns)))
    pair = Pair(memory, layout, data.draw(st.sampled_from(RATES)), own)
    write(pair, layout, turns, data.draw(st.integers(0, 2**32 - 1)), cuts)


LONG = tuple(TurnInput(ChunkRecord(turn, "v", (0.0,), (1, 2, 2)), None, (turn, turn + 1.0)) for turn in range(24))


@pytest.mark.parametrize("name", ["rcsm", "sink_window", "text_memory"])
def test_a_long_stream_outgrows_its_columns_and_stays_the_same(name):
    memory = MemoryConfig(name, 3, text_window=4, sink_tokens=5, tail_tokens=6)
    write(Pair(memory, LAYOUTS[0], RATES[0]), LAYOUTS[0], LONG, 0, [None] * len(LONG))


def _spoilt(method, spoil):
    return lambda *args, **kwargs: spoil(method, *args, **kwargs)


DEFECTS = {
    "a decision taken for a thought": (
        TurnState,
        "advance",
        lambda f, *a: Kind.THINK if f(*a) == Kind.DECISION else f(*a),
    ),
    "video a position late": (PositionCursor, "run", lambda f, *a: f(*a) + 1),
    "generated text a position late": (PositionCursor, "text", lambda f, *a: f(*a) + 1),
    "the neighbour leaves": (LiveSet, "drop", lambda f, live, rows: f(live, _moved(rows))),
    "a first turn without its system prompt": (Layout, "runs", lambda f, *a, first: f(*a)),
}


def _moved(rows: Rows) -> Rows:
    return Rows([(start + 1, stop + 1) for start, stop in rows.ranges])


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_a_planted_defect_is_seen(defect, monkeypatch):
    owner, name, spoil = DEFECTS[defect]
    monkeypatch.setattr(owner, name, _spoilt(getattr(owner, name), spoil))
    memory = MemoryConfig("rcsm", 2, text_window=2)
    with pytest.raises(AssertionError):
        write(Pair(memory, LAYOUTS[0], RATES[0]), LAYOUTS[0], LONG, 0, [None] * len(LONG))

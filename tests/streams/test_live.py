"""What a stream keeps between turns: rows as ranges, live tokens as blocks, the numbers of its turns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.layout.runs import runs_of
from streams.log.record import NEVER, Kind
from streams.memory import LiveTokens, Rows
from streams.memory.live import LiveSet, TurnHistory

COLUMNS = ("kind", "turn", "ids", "index", "ordinal", "lane", "position")
SEEN = COLUMNS[:5]
"""What a policy is shown."""


@given(st.lists(st.booleans(), max_size=40))
def test_rows_are_those_of_the_mask_that_they_come_from(flags):
    mask, numbers = np.array(flags, bool), np.arange(len(flags))
    rows = Rows.where(mask)
    assert (rows.mask(len(mask)) == mask).all()
    assert len(rows) == rows.count == mask.sum()
    assert rows.of(numbers).tolist() == numbers[mask].tolist()
    if rows.ranges:
        assert rows.without(numbers).tolist() == numbers[~mask].tolist()
        assert all(a < b for a, b in rows.ranges)
        assert all(b < c for (_, b), (c, _) in pairwise(rows.ranges)), "none touch"


@given(st.binary(max_size=20))
def test_runs_are_of_one_kind_and_make_up_the_whole(kinds):
    runs = runs_of(kinds)
    assert b"".join(bytes([kind]) * count for kind, _, count in runs) == kinds
    assert [start for _, start, _ in runs] == np.cumsum([0, *(count for *_, count in runs)])[:-1].tolist()
    assert all(a[0] != b[0] for a, b in pairwise(runs))


@dataclass
class Token:
    """A live token as the test counts it."""

    kind: int
    turn: int
    ids: int
    index: int
    ordinal: int
    lane: int
    position: int


@given(st.data())
def test_live_tokens_are_those_that_were_appended_and_not_dropped(data):
    """Against a list of tokens; what policies were shown before stays as it was."""
    live, tokens, appended, spoken = LiveSet(), [], 0, 0
    shown: list[tuple[LiveTokens, list[Token]]] = []
    for turn in range(data.draw(st.integers(1, 5))):
        leaves = np.array([data.draw(st.booleans()) for _ in tokens], bool)
        left = live.drop(Rows.where(leaves))
        assert [i for first, stop in left for i in range(first, stop)] == [
            token.index for token, gone in zip(tokens, leaves, strict=True) if gone
        ]
        tokens = [token for token, gone in zip(tokens, leaves, strict=True) if not gone]
        for generated in (False, True):
            some = (Kind.THINK, Kind.DECISION, Kind.END) if generated else (Kind.SCAFFOLD, Kind.VIDEO)
            kinds = sorted(data.draw(st.lists(st.sampled_from(some), max_size=5)))
            lane, count = data.draw(st.integers(0, 1)), len(kinds)
            ids = np.arange(count, dtype=np.int32) + 100 * turn
            positions = np.stack([ids + 3, ids + 2, ids + 4])
            ordinal = spoken if generated else -1
            live.append(appended, ids, positions, runs_of(bytes(kinds)), turn=turn, ordinal=ordinal, lane=lane)
            tokens += [
                Token(kind, turn, i, appended + n, ordinal + n if generated and kind != Kind.END else -1, lane, i + 2)
                for n, (kind, i) in enumerate(zip(kinds, ids.tolist(), strict=True))
            ]
            appended += count
            spoken += sum(kind != Kind.END for kind in kinds) if generated else 0
        shown.append((live.tokens(), tokens.copy()))
    for seen, were in shown:
        assert len(seen) == len(were)
        for name in COLUMNS:
            assert seen.column(name).tolist() == [getattr(token, name) for token in were], name
    made = LiveTokens(*(live.column(name) for name in SEEN))
    assert sum(size for _, (_, _, size) in made.runs) == len(live) == len(tokens)
    again = LiveTokens.of(made.blocks, len(made))
    assert all((again.column(name) == live.column(name)).all() for name in SEEN)


def test_only_live_tokens_are_dropped():
    live = LiveSet()
    live.append(0, np.arange(3), np.zeros((3, 3)), ((1, 0, 3),), turn=0)
    with pytest.raises(AssertionError, match="only live tokens"):
        live.drop(Rows([(2, 4)]))


def test_columns_can_only_be_read():
    live = LiveSet()
    live.append(0, np.arange(3), np.zeros((3, 3)), ((1, 0, 3),), turn=0)
    for name in COLUMNS:
        with pytest.raises(ValueError, match="read-only"):
            live.column(name)[0] = 9


def test_what_has_left_is_not_kept():
    """A stream without end: its live tokens take as much memory after a thousand turns as after ten."""
    live, sizes = LiveSet(), []
    for turn in range(1000):
        if turn >= 4:
            live.drop(Rows([(0, 5)]))
        live.append(5 * turn, np.zeros(5, np.int32), np.zeros((3, 5), np.int32), ((1, 0, 2), (2, 2, 3)), turn=turn)
        sizes.append(live.nbytes)
    assert sizes[-1] == sizes[9]


def test_the_history_of_turns_is_as_policies_are_told():
    history = TurnHistory()
    history.begin(has_video=True, video_tokens=4, generated=0)
    history.ask(None)
    history.begin(has_video=False, video_tokens=0, generated=6)
    history.ask(5)
    history.answered()
    start = history.begin(has_video=True, video_tokens=2, generated=9)
    assert (start.turn, start.has_video, start.video_tokens) == (2, True, 2)
    assert start.video_turns.tolist() == [0, 1, 1]
    assert start.generated.tolist() == [0, 6, 9]
    assert start.closed_in.tolist() == [1, 5]
    history.answered()
    assert history.begin(has_video=True, video_tokens=2, generated=9).closed_in.tolist() == [1, 5, NEVER]
    with pytest.raises(ValueError, match="read-only"):
        start.generated[0] = 1


def test_the_history_says_whether_a_query_may_be_open():
    history = TurnHistory()

    def asked() -> bool:
        return history.begin(has_video=True, video_tokens=1, generated=0).asked

    assert not asked()
    history.ask(None)  # in turn 0
    assert asked()
    history.answered()
    assert not asked()
    history.ask(4)  # in turn 2
    assert [asked() for _ in range(3)] == [True, True, False]


def test_the_history_grows():
    history = TurnHistory()
    starts = [history.begin(has_video=True, video_tokens=1, generated=3 * turn) for turn in range(300)]
    assert starts[-1].generated.tolist() == [3 * turn for turn in range(300)]
    assert starts[10].generated.tolist() == [3 * turn for turn in range(11)]
    assert history.nbytes <= 12 * 512

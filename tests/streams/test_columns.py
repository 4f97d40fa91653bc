"""Columns and what is built on them: growth, views that stay, the live tokens, the slots of a stream."""

from __future__ import annotations

import numpy as np
import pytest

from streams.log.record import NEVER, Kind
from streams.memory.columns import Columns
from streams.memory.live import LiveSet, TurnHistory


def columns() -> Columns:
    return Columns(("a", "b"))


def test_growth_keeps_what_was_written_and_costs_amortised():
    made, copies = columns(), set()
    for i in range(1000):
        made.append(1, a=i, b=np.full(1, 2 * i))
        copies.add(made.nbytes)
    assert made.column("a").tolist() == list(range(1000))
    assert (made.column("b") == 2 * np.arange(1000)).all()
    assert len(copies) <= 6, "capacity doubles"


def test_every_column_grows():
    with pytest.raises(AssertionError, match="every column grows"):
        columns().append(1, a=1)


def test_a_view_can_only_be_read_and_stays_as_it_was():
    made = columns()
    made.append(4, a=np.arange(4), b=0)
    view = made.column("a")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 9
    made.append(200, a=7, b=0)
    assert view.tolist() == [0, 1, 2, 3]
    assert made.column("a").tolist() == [0, 1, 2, 3] + [7] * 200


@pytest.mark.parametrize("rows", [[0], [2, 3, 4], [0, 2, 5], [5], range(6)])
def test_rows_are_removed_in_place_and_what_is_before_them_stays_as_it_was(rows):
    made = columns()
    made.append(6, a=np.arange(6), b=10 * np.arange(6))
    view, allocated = made.column("a"), made.nbytes
    made.remove(np.array(rows))
    left = [row for row in range(6) if row not in rows]
    assert made.column("a").tolist() == left
    assert made.column("b").tolist() == [10 * row for row in left]
    assert view[: rows[0]].tolist() == list(range(rows[0]))
    made.append(1, a=9, b=0)
    assert made.column("a").tolist() == [*left, 9]
    assert made.nbytes == allocated


def test_live_tokens_leave_by_their_place_and_are_named_by_their_index():
    live = LiveSet(positions=True)
    positions = np.array([[10, 11, 12, 13, 14], [20, 11, 12, 13, 13], [30, 11, 12, 13, 15]])
    live.append(slice(0, 3), [5, 6, 7], positions[:, :3], kind=Kind.SYSTEM, turn=0)
    live.append(slice(3, 4), [8], positions[:, 3:4], kind=Kind.THINK, turn=0, ordinal=0)
    assert live.drop(np.array([1, 3])).tolist() == [1, 3]
    live.append(slice(4, 5), [9], positions[:, 4:], kind=Kind.THINK, turn=1, ordinal=1, lane=1)
    tokens = live.tokens()
    assert tokens.index.tolist() == [0, 2, 4]
    assert tokens.ids.tolist() == [5, 7, 9]
    assert tokens.ordinal.tolist() == [-1, -1, 1]
    assert live.column("lane").tolist() == [0, 0, 1]
    assert live.column("position").tolist() == [10, 12, 13], "the first of three, as they stand on a line"


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

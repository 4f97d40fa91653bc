"""Matching, timing, form and scripts, against cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import (
    Format,
    StreamOutcome,
    Timing,
    format_score,
    match_answers,
    oracle_turns,
    silent_turns,
    spare_responses,
    timing_score,
)
from streams.task import Plan
from tests.support.rewards import make_task, one_answer, outcome, stream

pytestmark = pytest.mark.smoke


def matched(task, said, turns=12):
    return [(m.response_turn, m.response) for m in match_answers(outcome(task, said, turns))]


@pytest.mark.parametrize(
    ("said", "turn", "spare"),
    [
        ({}, None, 0),
        ({5: "red"}, 5, 0),
        ({2: "red"}, 2, 0),  # in the very turn of the query
        ({1: "red"}, None, 1),  # before the query
        ({1: "red", 4: "blue", 5: "red"}, 4, 2),  # the first after the query is taken, right or not
        ({9: "red", 10: "red"}, 9, 1),
        ({5: ""}, 5, 0),  # speaking without words is still speaking
    ],
)
def test_one_query_one_answer_takes_the_first_response(said, turn, spare):
    task = one_answer(query=2, due=5)
    (match,) = match_answers(outcome(task, said))
    assert (match.index, match.query_turn, match.due_turn) == (0, 2, 5)
    assert match.response_turn == turn
    assert match.response == (None if turn is None else said[turn])
    assert spare_responses(outcome(task, said)) == spare


def test_a_response_goes_to_the_answer_that_became_due_last():
    task = make_task([0.0], [(3.0, "one", "integer", 0), (6.0, "two", "integer", 0), (9.0, "three", "integer", 0)])
    assert matched(task, {3: "a", 6: "b", 9: "c"}) == [(3, "a"), (6, "b"), (9, "c")]
    # Missed the first: what is said at 7 is about the second, what follows at 8 about the first.
    assert matched(task, {7: "b", 8: "a"}) == [(8, "a"), (7, "b"), (None, None)]
    # Nothing due yet: early, to the answer due next; after that again to the next.
    assert matched(task, {1: "x", 2: "y"}) == [(1, "x"), (2, "y"), (None, None)]


def test_an_early_response_goes_to_the_query_asked_last():
    task = make_task([0.0, 4.0], [(10.0, "late", "text", 0), (7.0, "soon", "text", 1)])
    assert matched(task, {5: "x"}) == [(None, None), (5, "x")]
    assert matched(task, {2: "x"}) == [(2, "x"), (None, None)]
    assert matched(task, {5: "x", 6: "y"}) == [(6, "y"), (5, "x")]
    assert matched(task, {8: "x", 10: "y"}) == [(10, "y"), (8, "x")]


def test_only_turns_that_exist_count():
    task = one_answer(query=2, due=5)
    assert matched(task, {5: "red"}, turns=5) == [(None, None)]
    assert matched(task, {5: "red"}, turns=6) == [(5, "red")]


def test_turns_follow_the_task_start_and_the_chunk_length():
    task = make_task([1.0], [(3.1, "red", "text", 0)], start=10.0)
    (match,) = match_answers(StreamOutcome(task, stream({1: "red"}), 1.5))
    assert (match.query_turn, match.due_turn, match.response_turn) == (0, 2, 1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_chunks_need_a_length(seconds):
    with pytest.raises(ValueError, match=r"data\.video\.chunk_seconds"):
        StreamOutcome(one_answer(), (), seconds)


@pytest.mark.parametrize(
    ("turn", "settings", "score"),
    [
        (None, {}, 0.0),
        (5, {}, 1.0),
        (6, {}, 0.75),
        (8, {}, 0.25),
        (9, {}, 0.0),
        (20, {}, 0.0),
        (4, {}, 0.0),
        (6, {"slack": 1}, 1.0),
        (7, {"slack": 1}, 0.75),
        (6, {"late_slope": 0.0}, 1.0),
        (4, {"early_slope": 0.25}, 0.75),
        (3, {"early_slope": 0.25, "early_slack": 1}, 0.75),
        (4, {"early_slack": 1}, 1.0),
        (4, {"slack": 3}, 0.0),  # late slack forgives nothing early
        (1, {"early_slope": 0.0}, 0.0),  # before the query
        (2, {"early_slope": 0.0}, 1.0),
    ],
)
def test_timing_by_hand(turn, settings, score):
    assert timing_score(turn, 5, 2, **settings) == pytest.approx(score)
    said = {} if turn is None else {turn: "red"}
    assert Timing(**settings)(outcome(one_answer(2, 5), said, turns=25)) == pytest.approx([score])


SLOPES = st.floats(0, 3)


@given(st.integers(0, 30), st.integers(0, 30), SLOPES, SLOPES, SLOPES, SLOPES)
def test_timing_falls_on_both_sides_of_the_due_turn(due, away, slack, late, early, early_slack):
    settings = (slack, late, early, early_slack)
    assert timing_score(due, due, 0, *settings) == 1.0
    for step in (1, -1):
        near, far = (timing_score(due + step * d, due, 0, *settings) for d in (away, away + 1))
        assert 0.0 <= far <= near <= 1.0


@pytest.mark.parametrize("value", [-1, -0.1, float("nan"), float("inf"), "1", True, None])
@pytest.mark.parametrize("name", ["slack", "late_slope", "early_slope", "early_slack"])
def test_timing_refuses_settings_without_a_meaning(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        Timing(**{name: value})


def test_format_is_the_share_of_well_formed_turns():
    task = make_task([0.0], [(1.0, "a", "text", 0), (2.0, "b", "text", 0)])
    assert Format()(outcome(task, {}, turns=8, ill_formed=(1, 5))).tolist() == [0.75, 0.75]
    assert format_score(()) == 0.0
    assert format_score(stream({}, 3)) == 1.0


def test_scripts_by_hand():
    task = make_task([0.0, 4.0], [(6.0, "red", "text", 1), (2.0, "3", "integer", 0)])
    assert [t.response for t in oracle_turns(task, Plan(8, 1.0))] == [
        None,
        None,
        "3",
        None,
        None,
        None,
        "red",
        None,
    ]
    assert [t.response for t in oracle_turns(task, Plan(4, 2.0))] == [None, "3", None, "red"]
    assert [t.response for t in oracle_turns(task, Plan(4, 1.0))] == [None, None, "3", None]
    assert [t.response for t in silent_turns(3)] == [None] * 3
    assert [t.turn for t in oracle_turns(task, Plan(8, 1.0))] == list(range(8))


def test_an_oracle_cannot_say_two_answers_at_once():
    task = make_task([0.0], [(2.0, "a", "text", 0), (2.5, "b", "text", 0)])
    said = oracle_turns(task, Plan(5, 1.0))
    assert [t.response for t in said] == [None, None, "b", "a", None]
    assert [m.response for m in match_answers(StreamOutcome(task, said, 1.0))] == ["a", "b"]

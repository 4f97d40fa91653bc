"""Response count and think length: nothing is paid for saying or thinking more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import ResponseCount, RewardConfig, StreamOutcome, ThinkLength, ThinkOverlong, spare_responses
from streams.turns import ParsedTurn
from tests.support.rewards import make_task, one_answer, outcome

TWO = make_task([0.0, 4.0], [(2.0, "A", "choice", 0), (6.0, "B", "choice", 1)])


@pytest.mark.parametrize(
    ("task", "said", "value"),
    [
        (one_answer(2, 5), {5: "red"}, 1.0),
        (one_answer(2, 5), {5: "red", 6: "red"}, 0.75),
        (one_answer(2, 5), {0: "hm", 5: "red", 6: "red"}, 0.5),
        (one_answer(2, 5), dict.fromkeys(range(2, 12), "red"), 0.0),
        (one_answer(2, 5), {}, 0.0),
        # Said before the question: it answers nothing.
        (one_answer(2, 5), {0: "hm"}, 0.0),
        (TWO, {2: "A", 6: "B"}, 1.0),
        (TWO, {2: "A", 6: "B", 7: "B"}, 0.75),
    ],
)
def test_response_count_by_hand(task, said, value):
    found = ResponseCount()(outcome(task, said))
    assert found.tolist() == [pytest.approx(value)] * len(task.answers)


def test_slack_and_slope_of_the_response_count():
    seen = outcome(one_answer(2, 5), {5: "red", 6: "red", 7: "red"})
    assert ResponseCount(slack=1)(seen).tolist() == [0.75]
    assert ResponseCount(slope=0.1)(seen).tolist() == [0.8]
    assert ResponseCount(slope=0)(seen).tolist() == [1.0]


SAID = st.dictionaries(st.integers(0, 11), st.just("red"), max_size=8)


@given(SAID, st.integers(0, 11), st.floats(0, 2), st.floats(0, 3))
def test_one_more_response_that_answers_nothing_never_pays(said, more, slope, slack):
    before, after = outcome(TWO, said), outcome(TWO, said | {more: "hm"})
    if more not in said and spare_responses(after) == spare_responses(before) + 1:
        term = ResponseCount(slope=slope, slack=slack)
        assert (term(after) <= term(before)).all()


def thinking(lengths):
    turns = tuple(ParsedTurn(i, "", None, True, think_tokens=n) for i, n in enumerate(lengths))
    return StreamOutcome(one_answer(2, 5), turns, 1.0)


@pytest.mark.parametrize(
    ("lengths", "value"),
    [([2, 2], 1.0), ([20, 20], 1.0), ([30, 10], 1.0), ([30, 12], 0.95), ([30, 30], 0.5), ([40, 40], 0.0), ([], 1.0)],
)
def test_think_length_by_hand(lengths, value):
    assert ThinkLength()(thinking(lengths)).tolist() == [pytest.approx(value)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(0, 7),
    st.integers(1, 30),
    st.floats(0, 80),
    st.floats(0, 1),
)
def test_a_longer_thought_never_pays(lengths, where, more, budget, slope):
    longer = list(lengths)
    longer[where % len(lengths)] += more
    term = ThinkLength(budget=budget, slope=slope)
    assert (term(thinking(longer)) <= term(thinking(lengths))).all()


@pytest.mark.parametrize(
    ("lengths", "value"),
    # Spans of 16 to 19 tokens lose a fifth for each; a short thought does not make up for a long one.
    [([2, 15], 1.0), ([16], 0.8), ([19], 0.2), ([20], 0.0), ([40], 0.0), ([30, 10], 0.5), ([0, 16], 0.8), ([], 1.0)],
)
def test_overlong_thoughts_by_hand(lengths, value):
    assert ThinkOverlong()(thinking(lengths)).tolist() == [pytest.approx(value)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(0, 7),
    st.integers(1, 30),
    st.floats(1, 80),
    st.floats(0.01, 1),
)
def test_a_longer_thought_never_pays_under_overlong_either(lengths, where, more, cap, share):
    longer = list(lengths)
    longer[where % len(lengths)] += more
    term = ThinkOverlong(cap=cap, buffer=share * cap)
    assert (term(thinking(longer)) <= term(thinking(lengths))).all()
    assert (term(thinking(lengths)) >= 0).all()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("response_count", {"slope": -1}, "slope=-1"),
        ("response_count", {"slack": True}, "slack=True"),
        ("think_length", {"budget": float("inf")}, "budget=inf"),
        ("think_length", {"slope": "much"}, "slope='much'"),
        ("think_overlong", {"cap": -2}, "cap=-2"),
        ("think_overlong", {"cap": 4, "buffer": 5}, "buffer=5 must be above 0 and at most cap=4"),
        ("think_overlong", {"buffer": 0}, "buffer=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig("product", {name: params})

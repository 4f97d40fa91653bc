"""The published ThinkStream rewards against values worked out by hand, at every branch and boundary."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rewards import Reward, RewardConfig, StreamOutcome, get
from rewards.thinkstream import count_factor, first_literal, literal_answer, think_factor, time_factor
from streams.turns import ParsedTurn
from tests.support.project import ROOT
from tests.support.rewards import make_task, one_answer, outcome, stream

PRESET = ROOT / "conf" / "reward" / "thinkstream.yaml"


def preset():
    return Reward.from_config(RewardConfig(**OmegaConf.to_container(OmegaConf.load(PRESET))))


def term(name, **params):
    return get(f"thinkstream_{name}")(**params)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A", "A"),
        (" E \n", "E"),
        ("(C)", "C"),
        ("D.", "D"),
        ("yes", "yes"),
        ("YES", "yes"),
        ("No", "no"),
        ("7", "7"),
        ("0", "0"),
        # What the published rule does not read.
        ("F", None),
        ("a", None),
        ("(C", None),
        ("C)", None),
        ("(C).", None),
        ("C. red", None),
        ("AB", None),
        ("Yes.", None),
        ("yes it is", None),
        ("10", None),
        ("-3", None),
        ("٣", None),
        ("", None),
        ("red", None),
    ],
)
def test_what_is_read_literally(text, answer):
    assert literal_answer(text) == answer


@pytest.mark.parametrize(
    ("turn", "due", "slack", "value"),
    [
        (None, 5, 3, 0.0),
        (5, 5, 0, 1.0),
        (8, 5, 3, 1.0),
        (2, 5, 3, 1.0),
        (9, 5, 3, 0.8),
        (1, 5, 3, 0.8),
        (10, 5, 3, 0.6),
        (11, 5, 3, 0.4),
        (12, 5, 3, 0.2),
        (13, 5, 3, 0.0),
        (30, 5, 3, 0.0),
        (6, 5, 0, 0.8),
        (4, 5, 0, 0.8),
        (10, 5, 0, 0.0),
        (7, 5, 1, 0.8),
    ],
)
def test_time_factor(turn, due, slack, value):
    assert time_factor(turn, due, slack) == pytest.approx(value)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0.0, 0.0),
        (4.99, 0.0),
        (5.0, 0.25),
        (9.99, 0.25),
        (10.0, 0.5),
        (14.99, 0.5),
        (15.0, 1.0),
        (20.0, 1.0),
        (99.0, 1.0),
    ],
)
def test_think_factor(tokens, value):
    assert think_factor(tokens) == value


def test_think_factor_of_other_budgets():
    # Up to 5 there is no room for a step below budget - step: all thoughts are long enough.
    assert [think_factor(0.0, budget) for budget in (1, 5, 6)] == [1.0, 1.0, 0.0]
    # budget 30: full from 25 on, in 6 steps of 1/6.
    assert [think_factor(tokens, 30) for tokens in (4, 5, 24, 25)] == pytest.approx([0, 1 / 6, 4 / 6, 1])
    assert think_factor(3, budget=8, step=2) == 1 / 4


@pytest.mark.parametrize(
    ("responses", "value"),
    [
        (0, 0.0),
        (1, 1.0),
        (2, 0.75),
        (4, 0.75),
        (5, 0.5),
        (7, 0.5),
        (8, 0.25),
        (10, 0.25),
        (11, 0.0),
        (60, 0.0),
    ],
)
def test_count_factor(responses, value):
    assert count_factor(responses) == value


CHOICE = one_answer(query=2, due=5, text="B", kind="choice")


@pytest.mark.parametrize(
    ("said", "time", "correct"),
    [
        ({5: "B"}, 1.0, 1.0),
        ({8: "(B)"}, 1.0, 1.0),
        ({2: "B."}, 1.0, 1.0),
        ({9: "B"}, 0.8, 1.0),
        # What does not parse is passed over, by both.
        ({5: "The red one", 10: "B"}, 0.6, 1.0),
        ({5: "B. red"}, 0.0, 0.0),
        # The first that parses counts, right or wrong, and a later right one does not mend it.
        ({5: "A", 6: "B"}, 1.0, 0.0),
        # Also one said before the question came, in turn 2.
        ({1: "B"}, 0.8, 1.0),
        ({0: "no", 5: "B"}, 0.6, 0.0),
        ({}, 0.0, 0.0),
    ],
)
def test_the_first_response_that_parses_decides_time_and_correctness(said, time, correct):
    seen = outcome(CHOICE, said)
    assert term("time")(seen) == pytest.approx([time])
    assert term("correctness")(seen) == pytest.approx([correct])


@pytest.mark.parametrize(
    ("chunk", "turn", "value"),
    [
        # Due at 12 s. Chunks of 1 s: slack 3; of 2 s: 1; of 3 s: 1; of 4 s and more: 0.
        (1.0, 15, 1.0),
        (1.0, 16, 0.8),
        (2.0, 7, 1.0),
        (2.0, 8, 0.8),
        (3.0, 5, 1.0),
        (3.0, 6, 0.8),
        (4.0, 3, 1.0),
        (4.0, 4, 0.8),
    ],
)
def test_the_slack_is_three_seconds_in_whole_chunks(chunk, turn, value):
    seen = StreamOutcome(one_answer(2, 12, "B", "choice"), stream({turn: "B"}, turns=20), chunk)
    assert term("time")(seen) == pytest.approx([value])


def test_a_stream_cut_before_its_answer_is_due_counts_from_its_last_chunk():
    # Due in turn 9, but only turns 0 to 4 exist: turn 4 counts as due, turn 0 is 4 away, 1 over the slack.
    assert term("time")(outcome(one_answer(2, 9, "B"), {0: "B"}, turns=5)) == pytest.approx([0.8])
    assert term("time")(outcome(one_answer(2, 9, "B"), {}, turns=0)) == pytest.approx([0.0])


def test_only_the_first_expected_answer_counts_and_all_answers_get_its_value():
    task = make_task([0.0], [(2.0, "A", "choice", 0), (6.0, "B", "choice", 0)])
    seen = outcome(task, {7: "B"})
    assert term("correctness")(seen).tolist() == [0.0, 0.0]
    # Due in turn 2, said in turn 7: 5 away, 2 over the slack.
    assert term("time")(seen) == pytest.approx([0.6, 0.6])


def test_an_expected_answer_that_does_not_parse_can_never_be_met():
    assert term("correctness")(outcome(one_answer(2, 5, "red"), {5: "red"})).tolist() == [0.0]
    assert term("correctness")(outcome(one_answer(2, 5, "10"), {5: "10"})).tolist() == [0.0]


def thinking(lengths, said):
    return tuple(ParsedTurn(i, "", said.get(i), True, think_tokens=n) for i, n in enumerate(lengths))


@pytest.mark.parametrize(
    ("lengths", "said", "value"),
    [
        ([20, 20, 20], {2: "B"}, 1.0),
        # The mean counts: (20 + 10 + 15) / 3 = 15; (20 + 9 + 15) / 3 < 15.
        ([20, 10, 15], {2: "B"}, 1.0),
        ([20, 9, 15], {2: "B"}, 0.5),
        # A turn without a think span is left out of the mean.
        ([20, 0, 20], {2: "B"}, 1.0),
        ([0, 0, 0], {2: "B"}, 0.0),
        ([2, 2, 2], {2: "B"}, 0.0),
        ([20, 20, 20], {}, 0.0),
        # Every response counts, also an empty one and one that does not parse.
        ([20, 20, 20], {0: "hm", 1: "", 2: "B"}, 0.75),
        ([12, 12, 12], {0: "hm", 2: "B"}, 0.375),
    ],
)
def test_efficiency_is_think_factor_times_count_factor(lengths, said, value):
    seen = StreamOutcome(CHOICE, thinking(lengths, said), 1.0)
    assert term("efficiency")(seen) == pytest.approx([value])


def test_the_preset_by_hand():
    reward = preset()
    turns = list(thinking([20] * 12, {9: "B", 10: "B"}))
    turns[0] = replace(turns[0], well_formed=False)
    result = reward(StreamOutcome(CHOICE, tuple(turns), 1.0))
    assert result.failed is None
    assert result.components == pytest.approx({"format": 11 / 12, "time": 0.8, "correctness": 1.0, "efficiency": 0.75})
    assert result.total == pytest.approx(0.2 * 11 / 12 + 0.2 * 0.8 + 0.4 * 1.0 + 0.2 * 0.75)


def test_the_ends_of_the_preset():
    reward = preset()
    perfect = StreamOutcome(CHOICE, thinking([20] * 12, {5: "B"}), 1.0)
    assert reward(perfect).total == pytest.approx(1.0)
    # Silence keeps its form and nothing else; no turn at all is worth nothing.
    assert reward(StreamOutcome(CHOICE, thinking([20] * 12, {}), 1.0)).total == pytest.approx(0.2)
    assert reward(StreamOutcome(CHOICE, (), 1.0)).total == 0.0


def test_the_preset_holds_the_published_weights():
    weights = {name: params["weight"] for name, params in OmegaConf.load(PRESET).terms.items()}
    assert weights == {"format": 0.2, "time": 0.2, "correctness": 0.4, "efficiency": 0.2}


SAID = st.dictionaries(st.integers(0, 11), st.sampled_from(["A", "B", "red", "", "yes", "10"]), max_size=12)


@given(SAID, st.lists(st.integers(0, 40), min_size=12, max_size=12), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_every_term_stays_in_its_range_and_is_the_same_for_all_answers(said, lengths, chunk):
    task = make_task([0.0, 1.0], [(2.0, "A", "choice", 0), (6.0, "B", "choice", 1)])
    seen = StreamOutcome(task, thinking(lengths, said), chunk)
    assert preset()(seen).failed is None
    for name in ("time", "correctness", "efficiency"):
        values = term(name)(seen)
        assert len(set(values.tolist())) == 1
        assert ((values >= 0) & (values <= 1)).all()
    found = first_literal(seen.turns)
    assert (found is None) == np.isin(list(said.values()), ["red", "", "10"]).all()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("time", {"slack_s": -1}, "slack_s=-1"),
        ("time", {"slack_s": float("nan")}, "slack_s=nan"),
        ("time", {"window": 0}, "window=0"),
        ("efficiency", {"budget": 0}, "budget=0"),
        ("efficiency", {"response_step": 0}, "response_step=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig("product", {"x": {"target": f"thinkstream_{name}", **params}})

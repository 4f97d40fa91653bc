"""Demonstrations: how often and how far they are late, what is thought meanwhile, and that they are repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.training import SftConfig
from sft.demonstrations import script_for
from streams.messages import ScriptedTurn
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery, TimedThought

pytestmark = pytest.mark.smoke

CHUNK_S = 0.5
SPOKEN = "red"


def task(name="a", due=(4,), *, start=0.0, thoughts=(), chunks=40):
    """A task whose answers become due in the given chunks of half a second."""
    return StreamTask(
        id=name,
        video="v.mp4",
        start=start,
        end=start + chunks * CHUNK_S,
        queries=(TimedQuery(start, "What colour?"),),
        answers=tuple(ExpectedAnswer(start + chunk * CHUNK_S, f"{SPOKEN}{chunk}") for chunk in due),
        thoughts=tuple(TimedThought(start + chunk * CHUNK_S, text) for chunk, text in thoughts),
    )


def said(script):
    return {turn: words.response for turn, words in enumerate(script) if words.response is not None}


def delays(config, n=4000, due=4, turns=40, seed=0):
    """The delay of the only answer of each of n tasks."""
    spoken = [
        list(said(script_for(task(f"t{i}", (due,)), Plan(turns, CHUNK_S), config, seed=seed, epoch=0)))
        for i in range(n)
    ]
    assert all(len(found) == 1 for found in spoken)
    return np.array([found[0] for found in spoken]) - due


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.7, 1.0])
def test_the_share_of_late_answers_is_the_configured_probability(probability):
    late = delays(SftConfig(late_probability=probability, late_min=1, late_max=4)) > 0
    tolerance = 4 * np.sqrt(probability * (1 - probability) / len(late))
    assert abs(late.mean() - probability) <= tolerance


def test_a_late_answer_is_uniformly_between_the_two_limits_both_included():
    found = delays(SftConfig(late_probability=1.0, late_min=2, late_max=6))
    counts = np.bincount(found, minlength=7)
    assert counts[:2].sum() == 0
    assert len(counts) == 7
    expected = len(found) / 5
    # 4 degrees of freedom: 18.5 is exceeded once in a thousand; the draws are fixed.
    assert ((counts[2:] - expected) ** 2 / expected).sum() < 18.5


DUE = st.lists(st.integers(0, 19), min_size=1, max_size=4, unique=True).map(sorted)


@given(DUE, st.integers(0, 6), st.integers(1, 4), st.integers(0, 4), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_every_answer_is_said_once_never_early_and_within_the_limits_or_in_the_last_turn(
    due, tail, late_min, spread, probability, seed
):
    config = SftConfig(late_probability=probability, late_min=late_min, late_max=late_min + spread)
    turns = due[-1] + 1 + tail
    script = script_for(task(due=due, start=1.25), Plan(turns, CHUNK_S), config, seed=seed, epoch=0)
    assert len(script) == turns
    where = {}
    for turn, words in said(script).items():
        for word in words.split():
            assert word not in where, "said twice"
            where[word] = turn
    assert set(where) == {f"{SPOKEN}{chunk}" for chunk in due}
    for chunk in due:
        turn = where[f"{SPOKEN}{chunk}"]
        assert turn >= chunk, "spoken before it was due"
        delay = turn - chunk
        assert delay == 0 or late_min <= delay <= late_min + spread or turn == turns - 1


@given(DUE, st.integers(0, 2**31), st.integers(0, 50), st.text(min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_script_of_seed_epoch_and_task_is_always_the_same(due, seed, epoch, name):
    config = SftConfig(late_probability=0.5, pending_thought="{thought} {answer}")
    again = [script_for(task(name, due), Plan(25, CHUNK_S), config, seed=seed, epoch=epoch) for _ in range(2)]
    assert again[0] == again[1]


def test_another_seed_or_epoch_gives_other_delays():
    config = SftConfig(late_probability=0.5, late_max=6)

    def turns_of(seed, epoch):
        return [
            next(iter(said(script_for(task(f"t{i}"), Plan(40, CHUNK_S), config, seed=seed, epoch=epoch))))
            for i in range(50)
        ]

    assert turns_of(0, 0) == turns_of(0, 0)
    assert len({tuple(turns_of(seed, epoch)) for seed, epoch in ((0, 0), (1, 0), (0, 1))}) == 3


@pytest.mark.parametrize("due", [3, 4])
def test_an_answer_that_would_fall_past_the_end_is_said_in_the_last_turn(due):
    config = SftConfig(late_probability=1.0, late_min=3, late_max=8)
    script = script_for(task(due=(due,)), Plan(5, CHUNK_S), config, seed=0, epoch=0)
    assert said(script) == {4: f"{SPOKEN}{due}"}


def test_answers_that_end_up_in_one_turn_are_said_together_in_the_order_of_the_task():
    config = SftConfig(late_probability=1.0, late_min=9, late_max=9)
    script = script_for(task(due=(2, 4)), Plan(6, CHUNK_S), config, seed=0, epoch=0)
    assert said(script) == {5: f"{SPOKEN}2 {SPOKEN}4"}


def test_thoughts_stand_in_their_own_chunk_and_nothing_is_thought_elsewhere():
    thoughts = ((0, "a ball"), (2, "it rolls"))
    script = script_for(task(due=(3,), thoughts=thoughts, start=2.0), Plan(5, CHUNK_S), SftConfig(), seed=0, epoch=0)
    assert script == (
        ScriptedTurn("a ball", None),
        ScriptedTurn("", None),
        ScriptedTurn("it rolls", None),
        ScriptedTurn("", f"{SPOKEN}3"),
        ScriptedTurn("", None),
    )


def test_thoughts_of_one_chunk_are_one_thought():
    thoughts = ((0, "a ball"), (0, ""), (0, "red"), (1, ""))
    script = script_for(task(due=(1,), thoughts=thoughts), Plan(2, CHUNK_S), SftConfig(), seed=0, epoch=0)
    assert [turn.thought for turn in script] == ["a ball red", ""]


def test_a_pending_answer_is_thought_from_the_turn_it_is_due_to_the_turn_it_is_said():
    config = SftConfig(late_probability=1.0, late_min=2, late_max=2, pending_thought="{thought} answer {answer}")
    script = script_for(
        task(due=(2,), thoughts=((1, "one"), (2, "two"), (4, "four"), (5, "five"))),
        Plan(7, CHUNK_S),
        config,
        seed=0,
        epoch=0,
    )
    answer = f"{SPOKEN}2"
    assert [turn.thought for turn in script] == [
        "",
        "one",
        f"two answer {answer}",
        f" answer {answer}",
        f"four answer {answer}",
        "five",
        "",
    ]
    assert said(script) == {4: answer}


def test_an_answer_said_in_time_is_pending_for_that_one_turn():
    config = SftConfig(pending_thought="{answer}!")
    script = script_for(task(due=(1,)), Plan(3, CHUNK_S), config, seed=0, epoch=0)
    assert [turn.thought for turn in script] == ["", f"{SPOKEN}1!", ""]


def test_an_answer_due_after_the_cut_of_a_stream_is_not_said_before_it_is_due():
    script = script_for(task(due=(2, 9)), Plan(5, CHUNK_S), SftConfig(), seed=0, epoch=0)
    assert said(script) == {2: f"{SPOKEN}2"}

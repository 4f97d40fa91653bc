"""Groups that teach nothing give their places up, counted and bounded, or are trained as ever."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.training import AlgorithmConfig
from rewards import RewardResult
from rl.groups.spread import GivenUp, teaches_nothing
from rl.loop import RLLoop
from rl.results import RLResult
from streams.messages import GroupSummary
from tests.support.configs import composed
from tests.support.stage import stage_context
from tests.support.tasks import clip_task

pytestmark = pytest.mark.smoke


def loop_of(folder, *overrides):
    """A loop whose actors are never called: replies are handed to it."""
    config = composed(
        f"run_root={folder}",
        "algorithm.groups_in_flight=4",
        "algorithm.groups_per_step=4",
        "algorithm.group_size=2",
        *overrides,
    )
    context, told = stage_context(config, "rl", steps=50)
    made = RLLoop(context, (clip_task("a"), clip_task("b")))
    made.said = told.said
    return made


def score(loop, *rewards):
    assignment = loop.dispatch.next(loop.version, left=1000)
    summary = GroupSummary(
        assignment.group,
        assignment.task.id,
        assignment.worker,
        targets=((3, 2), (2, 2)),
        clip_seconds=10.0,
        versions=(0,),
    )
    assert loop.dispatch.returned(assignment, summary)
    loop._scored(tuple(RewardResult(r, {}, ()) for r in rewards), summary, None, assignment)
    return assignment


@pytest.fixture
def loop(tmp_path):
    return loop_of(tmp_path, "algorithm.zero_spread=resample", "algorithm.resample_most=3")


def test_such_a_group_gives_its_place_to_the_next_and_is_not_rolled_out_again(loop):
    gone = score(loop, 0.1, 0.1)
    assert (loop.buffer.untrained, loop.buffer.ready, list(loop.stage.dropped)) == (0, 0, [gone.group])
    kept = score(loop, 0.1, 0.3)
    assert kept.group != gone.group
    assert (loop.buffer.ready, loop.result.given_up.groups) == (1, 1)
    assert gone.group in loop.stage.done
    assert loop.result.dropped_groups == 0
    assert loop.said == [], "it is no failure"


def test_they_do_not_count_towards_the_stop_for_failing_groups(loop):
    for _ in range(200):
        score(loop, 1.0, 1.0)
        loop.result.given_up.since_step = 0
    assert loop.result.given_up.groups == 200


def test_after_so_many_they_are_trained_so_that_every_run_ends(loop):
    for _ in range(3):
        score(loop, 1.0, 1.0)
    assert loop.buffer.ready == 0
    for ready in range(1, 5):
        score(loop, 1.0, 1.0)
        assert loop.buffer.ready == ready
    assert loop.buffer.next_batch() is not None
    assert loop.result.given_up.groups == 3


def test_a_step_begins_the_count_anew_and_the_totals_stay(loop):
    score(loop, 1.0, 1.0)
    found = loop.result.given_up
    assert (found.groups, found.since_step) == (1, 1)

    class Report:
        version, age0 = 1, loop.result.age0

    loop.result.count_step(Report, [], [0], 0.5)
    assert (found.groups, found.since_step) == (1, 0)


def test_by_default_they_are_trained(tmp_path):
    loop = loop_of(tmp_path)
    score(loop, 1.0, 1.0)
    assert (loop.buffer.ready, loop.result.given_up) == (1, GivenUp())


def test_turn_credit_may_find_something_to_learn_in_equal_rewards(tmp_path):
    """What counts are advantages: one stream was right early, another one late."""
    turns = (np.array([0.25, 0.25, -0.5]), np.array([-0.25, 0.5]))
    assert not teaches_nothing(turns)
    assert teaches_nothing((np.full(5, 1e-12), np.zeros(0)))
    assert teaches_nothing(())


def test_what_was_given_up_is_counted_by_category_and_length(loop):
    score(loop, 1.0, 1.0)
    found = loop.result.given_up
    plan = loop.config.data.plan_of(clip_task("a")).turns
    low = max(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= plan)
    assert (found.by_category, found.by_turns) == ({"perception": 1}, {f"{low}-{2 * low - 1}": 1})
    assert found.clip_seconds == 10.0
    assert "1 groups (10 s of video) were given up" in found.in_words
    assert "by category perception 1" in found.in_words


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 500)), max_size=20))
def test_no_group_is_lost_from_the_counts_and_they_survive_a_checkpoint(groups):
    result = RLResult()
    for category, turns in groups:
        result.given_up.add(category, turns, 1.0)
    found = result.given_up
    assert sum(found.by_category.values()) == sum(found.by_turns.values()) == found.groups == len(groups)
    back = RLResult.restore(json.loads(json.dumps(result.counters())))
    assert asdict(back.given_up) == asdict(found)
    older = {key: value for key, value in result.counters().items() if key != "given_up"}
    assert RLResult.restore(older).given_up == GivenUp(), "a checkpoint of before"


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"algorithm\.zero_spread='drop' is not one of train, resample"):
        AlgorithmConfig(zero_spread="drop")
    with pytest.raises(ValueError, match=r"algorithm\.resample_most=0 must be at least 1"):
        AlgorithmConfig(resample_most=0)
    with pytest.raises(ValueError, match=r"deterministic=true needs algorithm\.zero_spread=train"):
        composed(f"run_root={tmp_path}", "deterministic=true", "algorithm.mode=sync", "algorithm.zero_spread=resample")

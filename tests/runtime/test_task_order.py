"""Groups that are done: kept as ranges of places, the same groups whatever came first and whatever became of the rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.results import RLResult
from runtime.store.checkpoint import STATE_FILE, CheckpointState, commit, partial_path, read_state
from runtime.store.ranges import Ranges
from runtime.task_order import GroupSet, TaskOrder, epochs, group_id, names_of
from streams.support.strict_json import dumps
from tests.support.tasks import clip_task

pytestmark = pytest.mark.smoke


@given(st.lists(st.integers(0, 60), unique=True))
@settings(max_examples=300, deadline=None)
def test_ranges_are_the_set_of_what_was_added_in_any_order(numbers):
    ranges = Ranges()
    for number in numbers:
        assert number not in ranges
        ranges.add(number)
        assert number in ranges
    held = set(numbers)
    assert list(ranges) == sorted(held)
    assert len(ranges) == len(held)
    assert {n for n in range(-1, 63) if n in ranges} == held
    gaps = sum(n + 1 not in held for n in held)
    assert len(ranges.pairs) == gaps, "one range for every gap after it"
    assert Ranges(reversed(ranges.pairs)).pairs == Ranges.of(numbers).pairs == ranges.pairs


def test_what_is_there_already_is_not_added_and_no_range_ends_before_it_begins():
    ranges = Ranges([(2, 5)])
    for number in (2, 4, 5):
        with pytest.raises(AssertionError, match=f"{number} is there already"):
            ranges.add(number)
    with pytest.raises(ValueError, match="a range from 5 to 4"):
        Ranges([(5, 4)])


def tasks_of(names):
    return tuple(clip_task(name) for name in names)


def walked(tasks, seed, count, done=()):
    return [group_id(*group) for group in islice(epochs(tasks, seed, done), count)]


def state_of(order, consumed, dropped=()):
    sets = [GroupSet(order), GroupSet(order)]
    for found, groups in zip(sets, (consumed, dropped), strict=True):
        for group in groups:
            found.add(group)
    return CheckpointState("rl", 1, 1, sets[0].stored(), sets[1].stored(), order.rows, order.seed)


@given(st.integers(1, 7), st.integers(0, 3), st.integers(0, 40), st.integers(1, 6), st.data())
@settings(max_examples=150, deadline=None)
def test_a_stage_that_goes_on_walks_what_is_left_and_keeps_no_more_than_its_gaps(rows, seed, trained, ahead, data):
    tasks = tasks_of("abcdefg"[:rows])
    order = TaskOrder([task.id for task in tasks], seed)
    window = walked(tasks, seed, trained + ahead)
    assert window == [order.group(place) for place in range(len(window))]
    # All but some of those that were under way, in any order.
    late = data.draw(st.sets(st.sampled_from(window), max_size=ahead))
    done = data.draw(st.permutations([group for group in window if group not in late]))
    dropped = done[: data.draw(st.integers(0, min(3, len(done))))]
    state = state_of(order, done[len(dropped) :], dropped)
    assert set(names_of(state)) | set(names_of(state, "dropped")) == set(done)
    assert len(state.consumed.ranges) <= len(late) + len(dropped) + 1
    assert state.consumed.names == state.dropped.names == ()
    sets = [GroupSet.restore(order, state, which) for which in ("consumed", "dropped")]
    assert [list(found) for found in sets] == [names_of(state), names_of(state, "dropped")]
    left = walked(tasks, seed, 10, set(done))
    assert left[: len(late)] == [group for group in window if group in late]
    assert left == walked(tasks, seed, 10, {*sets[0], *sets[1]})


@given(st.sets(st.sampled_from("abcdef"), min_size=1), st.integers(0, 25), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_rows_that_come_and_go_change_no_groups(rows, trained, seed):
    """Also those that are gone are remembered: they may come back."""
    before, now = TaskOrder("abcd", seed), TaskOrder(sorted(rows), seed)
    done = walked(tasks_of("abcd"), seed, trained)
    state = state_of(before, done)
    moved = GroupSet.restore(now, state, "consumed")
    assert set(moved) == set(done)
    assert len(moved) == len(done)
    assert all(group in moved for group in done)
    assert {name.split("/")[1] for name in moved.stored().names} <= set("abcd") - rows
    again = CheckpointState("rl", 1, 1, moved.stored(), rows=now.rows, seed=seed)
    back = GroupSet.restore(before, again, "consumed")
    assert back.stored() == state.consumed


def test_a_checkpoint_of_an_earlier_version_is_the_same_groups(tmp_path):
    tasks = tasks_of("abc")
    done = walked(tasks, 4, 5)
    old = {"stage": "rl", "version": 2, "step": 2, "consumed": done[:4], "dropped": done[4:], "group_size": 2}
    (tmp_path / STATE_FILE).write_text(json.dumps(old))
    state = read_state(tmp_path)
    assert (names_of(state), names_of(state, "dropped")) == (done[:4], done[4:])
    order = TaskOrder([task.id for task in tasks], 4)
    assert GroupSet.restore(order, state, "consumed").stored().ranges == ((0, 3),)
    assert RLResult.restore({"versions_seen": [0, 1, 2, 5]}).versions_seen == {0, 1, 2, 5}


def test_a_state_is_as_large_after_2000_steps_as_after_20(tmp_path):
    """Two groups are always late, as workers are; the versions that sampled are all of them."""
    tasks = tasks_of([f"train-{number}" for number in range(50)])
    order = TaskOrder([task.id for task in tasks], 0)
    sizes = {}
    for steps in (20, 2000):
        groups = walked(tasks, 0, 4 * steps)
        result = RLResult(steps=steps, versions_seen=set(range(steps)))
        assert RLResult.restore(json.loads(dumps(result.counters()))).versions_seen == result.versions_seen
        state = state_of(order, [*groups[:-4], groups[-3], groups[-1]])
        state = CheckpointState(**(vars(state) | {"counters": result.counters()}))
        commit(partial_path(tmp_path / str(steps)), tmp_path / str(steps), state)
        assert asdict(read_state(tmp_path / str(steps)))["consumed"] == asdict(state)["consumed"]
        sizes[steps] = (tmp_path / str(steps) / STATE_FILE).stat().st_size
    print(sizes)
    assert sizes[2000] < sizes[20] + 40, sizes

"""Encoded clips under their byte budget: what waits, what is kept, who sleeps until there is room."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.threads import EncodedClips, StoppedError, WeightsTurn

BUDGET, WAIT_S = 10, 30.0


def encoded(clips, key, nbytes):
    """A clip that waits, encoded."""
    place = clips.take(key, nbytes, wait=False)
    if place.value is None:
        assert clips.fill(place, key, clips.generation)
    return place


class Taker:
    """A thread that asks for room and may have to sleep for it."""

    def __init__(self, clips, key, nbytes):
        self.place, self.error = None, None
        self._clips, self._asked = clips, (key, nbytes)
        self.thread = threading.Thread(target=self._take, daemon=True)
        self.thread.start()

    def _take(self):
        try:
            self.place = self._clips.take(*self._asked, wait=True)
        except StoppedError as error:
            self.error = error

    def sleeps(self):
        give_up = time.monotonic() + WAIT_S
        while not self._clips._change._waiters:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        return self.place is None

    def done(self):
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self


def test_whoever_finds_no_room_sleeps_until_groups_run():
    clips = EncodedClips(BUDGET)
    first, second = encoded(clips, "a", 5), encoded(clips, "b", 4)
    assert clips.take("c", 4, wait=False) is None
    taker = Taker(clips, "c", 4)
    assert taker.sleeps()
    clips.leave(first)
    assert taker.done().place.value is None
    assert clips.used == 8, "the one that runs is kept no longer"
    clips.leave(second)
    assert clips.take("b", 4, wait=False) is second


def test_a_clip_that_waits_is_shared_and_counted_once():
    clips = EncodedClips(BUDGET)
    place = encoded(clips, "a", 6)
    assert clips.take("a", 6, wait=False) is place
    assert clips.used == 6
    clips.leave(place)
    assert clips.take("b", 6, wait=False) is None, "the other group still waits"
    clips.leave(place)
    assert clips.take("b", 6, wait=False).value is None


def test_a_clip_larger_than_the_budget_passes_alone():
    clips = EncodedClips(BUDGET)
    small = encoded(clips, "a", 1)
    taker = Taker(clips, "large", 50)
    assert taker.sleeps()
    clips.leave(small)
    large = taker.done().place
    assert clips.used == 50
    assert clips.take("b", 1, wait=False) is None
    clips.leave(large)
    assert clips.used == 0, "it is not kept"
    assert clips.take("b", 1, wait=False) is not None


def test_stopping_wakes_who_sleeps_and_refuses_who_comes():
    clips = EncodedClips(BUDGET)
    encoded(clips, "a", 9)
    taker = Taker(clips, "b", 9)
    assert taker.sleeps()
    clips.check()
    clips.stop()
    assert "waited for room under data.cache_mb" in str(taker.done().error)
    for asked in (clips.check, lambda: clips.take("a", 9, wait=True)):
        with pytest.raises(StoppedError):
            asked()


def test_new_weights_refuse_what_the_old_ones_made():
    clips = EncodedClips(BUDGET)
    waits, kept, half = encoded(clips, "waits", 2), encoded(clips, "kept", 2), clips.take("half", 2, wait=False)
    clips.leave(kept)
    old = clips.generation
    clips.outdate()
    assert (waits.outdated, half.outdated) == (True, False)
    assert not clips.fill(half, "old", old)
    assert half.value is None
    assert clips.fill(half, "new", clips.generation)
    assert clips.used == 4, "what waits counts until it leaves"
    clips.leave(waits)
    assert clips.used == 2
    assert clips.take("waits", 2, wait=False).value is None
    assert clips.take("kept", 2, wait=False).value is None


def test_a_clip_whose_encoding_failed_leaves_nothing():
    clips = EncodedClips(BUDGET)
    clips.leave(clips.take("a", 4, wait=False))
    assert (clips.used, len(clips)) == (0, 0)


SIZES = {"a": 3, "b": 4, "c": 6, "d": 10, "e": 25, None: 5}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "take", "leave", "outdate"]), st.integers(0, 5)), max_size=40))
def test_what_is_there_is_counted_and_never_above_the_budget_unless_it_is_one_clip(steps):
    clips = EncodedClips(BUDGET)
    waiting = []
    for step, number in steps:
        if step == "take":
            key = list(SIZES)[number]
            place = clips.take(key, SIZES[key], wait=False)
            if place is None:
                assert waiting, "nobody waits for nothing"
                continue
            waiting.append(place)
            if place.value is None:
                assert clips.fill(place, key, clips.generation)
            assert (place.value, place.outdated) == (key, False)
        elif step == "outdate":
            clips.outdate()
        elif waiting:
            place = waiting.pop(number % len(waiting))
            clips.leave(place)
        there = {id(place): place for place in (*waiting, *clips._places.values())}
        assert clips.used == sum(place.nbytes for place in there.values())
        assert clips.used <= BUDGET or len(there) == 1
    for place in waiting:
        clips.leave(place)
    assert clips.used == sum(place.nbytes for place in clips._places.values()) <= BUDGET


def test_weights_are_replaced_after_the_call_under_way_and_before_the_next():
    turn = WeightsTurn(WAIT_S)
    done, inside, go_on = [], threading.Event(), threading.Event()

    def encode():
        for number in range(3):
            with turn.read():
                inside.set()
                assert go_on.wait(WAIT_S)
                done.append(number)

    def swap():
        with turn.replace():
            done.append("swap")

    encoder = threading.Thread(target=encode, daemon=True)
    encoder.start()
    assert inside.wait(WAIT_S)
    swapper = threading.Thread(target=swap, daemon=True)
    swapper.start()
    while not turn._change._waiters:
        time.sleep(0.001)
    assert done == []
    go_on.set()
    encoder.join(WAIT_S)
    swapper.join(WAIT_S)
    assert done == [0, "swap", 1, 2]


def test_no_side_waits_for_the_weights_for_longer_than_its_limit():
    turn = WeightsTurn(0.01)
    with turn.read(), pytest.raises(TimeoutError, match=r"new weights waited rollout\.group_deadline_s=0\.01 for the"):
        turn.replace().__enter__()
    with turn.replace(), pytest.raises(TimeoutError, match="a clip waited"):
        turn.read().__enter__()
    with turn.read():
        pass

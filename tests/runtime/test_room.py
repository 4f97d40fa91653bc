"""Asking for room never holds up whoever asks."""

from __future__ import annotations

import threading

import pytest

from runtime.placing import room as module
from runtime.placing.room import RoomWatch

pytestmark = pytest.mark.timeout(60)


def test_looking_does_not_wait_and_asks_one_question_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.0)
    answers, asked = threading.Event(), []

    def has_room(seat):
        asked.append(seat)
        assert answers.wait(30), "as long as a GCS that is gone"
        return seat != 4

    watch = RoomWatch(has_room)
    for _ in range(3):
        watch.look((3, 4))
    assert watch.without == frozenset()
    answers.set()
    watch._asking.join(30)
    assert (asked, watch.without) == ([3, 4], {4})


def test_it_asks_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    asked = []
    watch = RoomWatch(asked.append)
    for now[0] in (100.0, 101.0, 101.9, 102.0, 103.0):
        watch.look((1,))
        watch._asking.join(30)
    assert asked == [1, 1]
    watch.ask((2,))
    assert watch.without == {2}, "asked for at once"

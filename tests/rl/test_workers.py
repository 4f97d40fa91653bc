"""Calls of workers whose processes come and go: replies that come late, work that is asked for again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rl.versions import VersionLedger
from rl.workers import CHECK_TRIES, PublishedGroups, Workers
from runtime.recovery.suspects import Suspects
from runtime.scoring.scorers import Scorers
from streams.messages import GroupSummary, SwapReport
from tests.support.configs import composed

BASE = composed()


class Actor:
    """One process: notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getattr__(self, method: str) -> Any:
        def remote(given: Any) -> Any:
            self.asked.append((method, given))
            reference = object()
            return (reference, "payload") if method == "rollout" else reference

        return SimpleNamespace(remote=remote, options=lambda num_returns: SimpleNamespace(remote=remote))


class Calls:
    """Takes the place of Events: calls in the order in which they were made, to be answered or lost in any other."""

    def __init__(self) -> None:
        self.pending: list[SimpleNamespace] = []

    def expect(self, reference, what, handle, failed=None, lost=None):
        self.pending.append(SimpleNamespace(what=what, handle=handle, lost=lost))

    def answer(self, number: int, value: Any) -> None:
        self.pending.pop(number).handle(value)

    def lose(self, number: int) -> None:
        lost = self.pending.pop(number).lost
        if lost is not None:
            lost()


@pytest.fixture
def world():
    scorers = Scorers(BASE.reward, BASE.cluster, ("scorer",), lambda place: Actor())
    crew = SimpleNamespace(places=SimpleNamespace(workers=[Actor(), Actor()]), scorers=scorers)
    calls, alive = Calls(), []
    ledger = VersionLedger(workers=2, max_lag=1)
    gate = SimpleNamespace(observe=lambda *_: None)
    workers = Workers(
        SimpleNamespace(crew=crew), calls, ledger, gate, SimpleNamespace(alive=alive.append, suspects=Suspects())
    )
    return SimpleNamespace(crew=crew, calls=calls, ledger=ledger, workers=workers, alive=alive)


def swap(worker: int, version: int) -> SwapReport:
    return SwapReport(worker, version, 0.0, 0.0, 0.0)


def test_a_swaps_reply_that_comes_after_its_process_died_is_nobodys(world):
    world.workers.publish(1, "weights")
    world.ledger.lose(0)
    world.crew.places.workers[0] = Actor()
    world.calls.answer(0, swap(0, 1))
    assert 0 not in world.ledger.running
    world.ledger.restore(0, 0)
    world.workers.catch_up()
    assert [method for method, _ in world.crew.places.workers[0].asked] == ["update_weights"], (
        "the new one fetches for itself"
    )
    world.calls.answer(1, swap(0, 1))
    world.calls.answer(0, swap(1, 1))
    assert world.ledger.running == {0: 1, 1: 1}
    assert [report.worker for report in world.workers.take_swaps()] == [0, 1]


def summary(worker: int, failed: str | None = None) -> GroupSummary:
    return GroupSummary("published", "a", worker, failed=failed)


def test_the_last_check_tries_further_tasks_where_one_fails_and_waits_for_who_is_replaced(world):
    names: list[str] = []
    groups = PublishedGroups(
        world.workers, 0, lambda name: names.append(name) or SimpleNamespace(group=name), lambda: {0, 1}
    )
    world.ledger.lose(1)
    script = iter(
        (
            lambda: world.calls.answer(0, summary(0, failed="a broken video")),
            lambda: world.ledger.restore(1, 0),
            lambda: world.calls.answer(0, summary(0)),
            lambda: world.calls.lose(0),
            lambda: world.calls.answer(0, summary(1)),
        )
    )
    assert groups.payloads(lambda: next(script)()) == ("payload", "payload")
    assert names == ["published-0", "published-0", "published-1", "published-1"]


def test_the_last_check_ends_without_a_worker_whose_tasks_all_fail(world):
    asked = 0

    def extra(name: str) -> Any:
        nonlocal asked
        asked += name == "published-0"
        return SimpleNamespace(group=name)

    groups = PublishedGroups(world.workers, 0, extra, lambda: {0, 1})

    def wait() -> None:
        worker = int(world.calls.pending[0].what[-1])
        world.calls.answer(0, summary(worker, failed=None if worker else "a broken video"))

    assert groups.payloads(wait) == ("payload",)
    assert asked == CHECK_TRIES

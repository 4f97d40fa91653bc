"""Scorers whose processes come and go, and the calls that they leave without a reply; without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from conf.platform import ClusterConfig
from rewards.compose import RewardConfig
from runtime.cluster.events import ActorDeath
from runtime.scoring import scorers as module
from runtime.scoring.scorers import Scorers, Scoring
from streams.messages import RewardJob
from streams.task import Plan
from tests.support.rewards import one_answer, stream

TERMS = {"correctness": {}, "mine": {"target": "tests.support.stuck_reward:stuck"}}
REWARD = RewardConfig(terms=TERMS, timeout_s=10)
CLUSTER = ClusterConfig(call_timeout_s=100, start_timeout_s=50, wait_s=300)


class Actor:
    """One process. A reference is what it was asked."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *given: (method, *given))


class World:
    """Calls in the order in which they were made, to be answered or lost in any other; and a clock."""

    def __init__(self, monkeypatch, places: int) -> None:
        self.now, self.ended, self.made, self.pending, self.found = 0.0, [], [], [], []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.ray, "kill", self.ended.append)
        self.room = SimpleNamespace(look=lambda seats: None, without=frozenset())
        names, seats = [f"scorer-{i}" for i in range(places)], [5 + i for i in range(places)]
        self.scorers = Scorers(REWARD, CLUSTER, names, self.make, self.room, seats)
        self.scoring = Scoring(self.scorers, self.expect)

    def make(self, place: int) -> Actor:
        self.made.append(Actor(place))
        return self.made[-1]

    def expect(self, reference, what, handle, *, lost, own_limit) -> None:
        assert own_limit
        self.pending.append(SimpleNamespace(reference=reference, what=what, handle=handle, lost=lost))

    def answer(self, number: int = 0) -> None:
        """As the real scorer would: with a pid, or with one result per job."""
        call = self.pending.pop(number)
        method, *given = call.reference
        call.handle(7 if method == "pid" else tuple((f"result of {len(job.turns)}",) for job in given[0]))

    def lose(self, place: int, number: int = 0) -> None:
        call = self.pending.pop(number)
        self.scorers.died(
            f"scorer-{place}", f"scorer-{place} died: of it\nits log", ActorDeath(call.what, ActorDiedError())
        )
        call.lost()

    @property
    def waits_for(self) -> list[str]:
        return [call.what for call in self.pending]


def group(streams: int = 2) -> RewardJob:
    return RewardJob("0/a", one_answer(), Plan(12, 1.0), tuple(stream({5: "red"}) for _ in range(streams)))


@pytest.fixture(params=[1, 2])
def world(monkeypatch, request):
    return World(monkeypatch, request.param)


def test_a_process_answers_before_it_is_asked_for_the_first_time_only(world):
    places = len(world.scorers.names)
    for _ in range(places):
        world.scoring.score((group(),), "group 0/a", world.found.append)
    assert world.waits_for == [f"scorer-{i} to start" for i in range(places)]
    for _ in range(2 * places):
        world.answer()
    assert world.found == [[("result of 1", "result of 1")]] * places
    world.scoring.score((group(),), "group 0/b", world.found.append)
    assert world.waits_for == ["the scores of group 0/b"]


def test_a_stream_that_ends_two_scorers_gets_a_failed_result_with_cause_and_the_others_their_own(world):
    places = len(world.scorers.names)
    world.scoring.score((group(),), "group 0/a", world.found.append)
    world.answer()
    world.lose(0)
    other = places - 1
    assert [a.place for a in world.made] == [*range(places), 0], "another process in the place of the one that died"
    assert world.waits_for == [f"scorer-{other} to start"], "it must answer before it gets what may end it"
    world.answer()
    assert world.waits_for == ["the scores of group 0/a"]
    world.lose(other)
    world.answer()
    world.answer()
    (((first, second),),) = world.found
    assert (
        first.failed
        == f"stream task-7: the second scorer died while it computed this reward: scorer-{other} died: of it"
    )
    assert (first.total, first.components) == (0.0, {"correctness": 0.0, "mine": 0.0})
    assert [(a.correct, a.value) for a in first.answers] == [(True, 0.0)]
    assert second == "result of 1"
    assert not world.pending


def test_who_dies_before_it_has_answered_costs_no_stream_and_after_three_times_the_run(world):
    world.scoring.score((group(),), "group 0/a", world.found.append)
    world.lose(0)
    world.lose(0)
    with pytest.raises(RuntimeError, match=r"scorer-0 died 3 times in a row .* the first time: scorer-0 died: of it"):
        world.lose(0)
    assert world.found == []


def test_one_that_dies_of_every_call_has_answered_each_time(monkeypatch):
    world = World(monkeypatch, 1)
    for _ in range(4):
        world.scoring.score((group(1),), "group 0/a", world.found.append)
        for _ in range(2):
            world.answer()
            world.lose(0)
    assert len(world.found) == 4


def test_whoever_does_not_reply_in_time_is_ended(world, caplog):
    world.scoring.score((group(),), "group 0/a", world.found.append)
    first = world.made[0]
    world.now = 50
    world.scorers.look()
    assert world.ended == []
    world.answer()
    # Two streams with two terms each, and what a call takes beside them.
    limit = 2 * 2 * (10 + module.GRACE_S) + module.SLACK_S
    world.now += limit
    world.scorers.look()
    assert world.ended == []
    world.now += 1
    world.scorers.look()
    world.scorers.look()
    assert world.ended == [first]
    assert f"scorer-0 has not replied for {limit:.0f} s (reward.timeout_s): it is ended" in caplog.text


def test_a_call_holds_as_many_streams_as_can_take_the_time_of_a_call(monkeypatch):
    world = World(monkeypatch, 1)
    world.scoring.score((group(8),), "group 0/a", world.found.append)
    world.answer()
    (_, jobs) = world.pending[0].reference
    assert len(jobs) == 2
    assert (len(jobs) + 1) * 2 * (10 + module.GRACE_S) + module.SLACK_S > CLUSTER.call_timeout_s
    while world.pending:
        world.answer()
    assert world.found == [[("result of 1",) * 8]]


def test_nobody_is_ended_for_a_reply_that_nobody_waits_for(world):
    world.scoring.score((group(),), "group 0/a", world.found.append)
    Scoring(world.scorers, world.expect)  # the stage has begun anew
    world.now = 10_000
    world.scorers.look()
    assert world.ended == []


def test_one_without_room_gets_no_call_while_another_one_has(monkeypatch, caplog):
    world = World(monkeypatch, 2)
    world.scoring.score((group(),), "group 0/a", world.found.append)
    world.room.without = frozenset({5})
    world.scorers.look()
    assert world.ended == [world.made[0]]
    assert "no node has room for scorer-0: it starts when one has" in caplog.text
    world.lose(0)
    assert world.waits_for == ["scorer-1 to start"]
    for _ in range(2):
        world.answer()
    for n in range(9):
        world.scoring.score((group(),), f"group 0/{n}", world.found.append)
        world.scorers.look()
        assert world.waits_for == [f"the scores of group 0/{n}"]
        world.answer()
    world.room.without = frozenset()
    world.scorers.look()
    for name in "bc":
        world.scoring.score((group(),), f"group 0/{name}", world.found.append)
    assert world.waits_for == ["scorer-0 to start", "the scores of group 0/c"]


def test_a_stream_that_ended_the_only_scorer_with_room_is_asked_again_there(monkeypatch):
    world = World(monkeypatch, 2)
    world.scorers.absent = frozenset({1})
    world.scoring.score((group(1),), "group 0/a", world.found.append)
    world.answer()
    world.lose(0)
    assert world.waits_for == ["scorer-0 to start"]


def test_room_for_any_scorer_is_waited_for_as_long_as_for_a_worker(world):
    world.scoring.score((group(),), "group 0/a", world.found.append)
    world.room.without = frozenset({5, 6})
    for _ in range(2):
        world.scorers.look()
    if len(world.scorers.names) == 2:
        # Only one has been asked, so only of one it is known.
        world.lose(0)
        world.scorers.look()
    ended = list(world.ended)
    for world.now in range(0, 300, 40):
        world.scorers.look()
    assert world.ended == ended, "who has no room is not too slow to start"
    world.now = 400
    with pytest.raises(TimeoutError, match=r"waited 300 s \(cluster.wait_s\) for a node with room for a scorer"):
        world.scorers.look()

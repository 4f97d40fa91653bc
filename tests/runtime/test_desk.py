"""Which scorer computes which streams: every stream gets one result, whichever scorers die, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.compose import RewardResult
from runtime.scoring.desk import MOST_GROUPS, Call, Desk, GivenUp
from streams.messages import RewardJob
from streams.task import Plan
from streams.turns import ParsedTurn
from tests.support.tasks import clip_task

PLAN = Plan(1, 1.0)
PER_CALL = 7


def job(name: str, streams: int) -> RewardJob:
    """Streams whose one turn says which they are."""
    turns = tuple((ParsedTurn(0, "", f"{name}/{i}", well_formed=True),) for i in range(streams))
    return RewardJob(f"0/{name}", clip_task(name), PLAN, turns)


def named(job: RewardJob) -> list[str]:
    return [str(turns[0].response) for turns in job.turns]


def result(name: str, failed: str | None = None) -> RewardResult:
    return RewardResult(0.0, {"name": hash(name)}, (), failed)


def give_up(job: RewardJob, cause: str) -> RewardResult:
    (name,) = named(job)
    return result(name, cause)


@dataclass
class World:
    """Scorers around a desk. deadly: streams that end whoever computes them."""

    places: int
    deadly: frozenset[str]
    out: list[Call] = field(default_factory=list)
    deaths_with: dict[str, list[int]] = field(default_factory=dict)
    found: dict[str, list[RewardResult]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.desk = Desk(self.places, PER_CALL, give_up, GivenUp())

    def ask(self, jobs: list[RewardJob]) -> None:
        def handle(results):
            assert [len(r) for r in results] == [len(j.turns) for j in jobs]
            for asked, given_results in zip(jobs, results, strict=True):
                for name, value in zip(named(asked), given_results, strict=True):
                    self.found.setdefault(name, []).append(value)

        self.desk.ask(jobs, "the scores", handle)

    def send(self) -> None:
        while (call := self.desk.next()) is not None:
            assert call.place not in [other.place for other in self.out], "one call at a time"
            assert len(call.streams) <= PER_CALL
            for name in self.streams(call):
                before = self.deaths_with.get(name, [])
                assert call.alone == bool(before)
                assert len(before) < 2
                if before and self.places > 1:
                    assert call.place != before[-1], "asked again of another one"
            self.out.append(call)

    def streams(self, call: Call) -> list[str]:
        return [name for job in call.jobs for name in named(job)]

    def answer(self, call: Call) -> None:
        self.out.remove(call)
        self.desk.answered(call, [result(name) for name in self.streams(call)])

    def lose(self, call: Call, *, begun: bool) -> None:
        self.out.remove(call)
        if begun:
            for name in self.streams(call):
                self.deaths_with.setdefault(name, []).append(call.place)
        self.desk.lost(call, "it died", begun=begun)


@given(
    st.integers(1, 4), st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4), st.integers(0, 999)
)
def test_every_stream_gets_one_result_whatever_dies(places, sizes, seed):
    chance = random.Random(seed)
    requests = [[job(f"r{r}j{j}", 4 * count) for j, count in enumerate(counts)] for r, counts in enumerate(sizes)]
    everyone = [name for jobs in requests for asked in jobs for name in named(asked)]
    groups = sorted({name.partition("/")[0] for name in everyone})
    # Fewer groups than those that end a run.
    bad = chance.sample(groups, min(len(groups), chance.randint(0, 3)))
    world = World(places, frozenset(n for n in everyone if n.partition("/")[0] in bad and chance.random() < 0.5))
    hits = 4  # deaths that have nothing to do with a stream
    unlucky: set[str] = set()
    while True:
        if requests and (not world.out or chance.random() < 0.3):
            world.ask(requests.pop())
        world.send()
        if not world.out and not requests:
            break
        if not world.out:
            continue
        call = chance.choice(world.out)
        names = world.streams(call)
        hit = chance.choice(("no", "no", "no", "before", "during")) if hits else "no"
        if hit != "no":
            hits -= 1
            unlucky |= set(names) if hit == "during" else set()
            world.lose(call, begun=hit == "during")
        elif set(names) & world.deadly:
            world.lose(call, begun=True)
        else:
            world.answer(call)
    assert set(world.found) == set(everyone)
    for name, values in world.found.items():
        (value,) = values
        assert value.components == result(name).components, "its own"
        assert (value.failed is not None) == (len(world.deaths_with.get(name, [])) == 2)
        if name in world.deadly:
            assert "the second scorer died while it computed this reward: it died" in str(value.failed)
        elif name not in unlucky:
            assert value.failed is None


def test_whoever_dies_before_a_call_costs_nothing_however_often():
    world = World(2, frozenset())
    world.ask([job("a", 3)])
    for _ in range(20):
        world.send()
        world.lose(world.out[0], begun=False)
    world.send()
    world.answer(world.out[0])
    assert [value.failed for values in world.found.values() for value in values] == [None] * 3


def test_a_request_without_streams_is_answered_at_once():
    found = []
    desk = Desk(1, PER_CALL, give_up, GivenUp())
    desk.ask([], "nothing", found.append)
    desk.ask([job("a", 0)], "no stream", found.append)
    assert (found, desk.next()) == ([[], [()]], None)


def lost(world: World, name: str) -> None:
    """Have a group of two streams end every scorer."""
    world.ask([job(name, 2)])
    for _ in range(3):
        world.send()
        world.lose(world.out[0], begun=True)


@pytest.mark.parametrize("places", [1, 2])
def test_rewards_that_end_every_scorer_end_the_run_with_the_first_cause(places):
    world = World(places, frozenset())
    for number in range(MOST_GROUPS - 1):
        lost(world, f"a{number}")
    with pytest.raises(
        RuntimeError, match=r"8 groups in a row ended every scorer.*the first: stream a0: .*fix the reward"
    ):
        lost(world, "last")


def test_one_result_between_them_and_the_run_goes_on():
    world = World(2, frozenset())
    for number in range(3 * MOST_GROUPS):
        lost(world, f"a{number}")
        if number % (MOST_GROUPS - 1) == 3:
            world.ask([job(f"good{number}", 1)])
            world.send()
            world.answer(world.out[0])

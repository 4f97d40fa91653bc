"""Who is replaced, who ends the run, and who is ended because it hangs; without processes."""

from __future__ import annotations

import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from ray import ActorID, JobID, ObjectRef
from ray._raylet import TaskID
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError

from runtime.cluster import events
from runtime.cluster.events import ActorDeath, ActorLostError, Events, death_of, wait_for
from runtime.cluster.learners import LearnerGroup
from runtime.recovery import watch
from runtime.recovery.revival import Revival, deaths_in_words
from runtime.recovery.suspects import Suspects
from runtime.recovery.watch import Watch
from runtime.stop import StopSignal
from streams.messages import WorkerStats

NOBODY = SimpleNamespace(look=lambda: None)
"""Scorers that owe no reply."""


class World:
    """A crew of two whose processes are numbers, and what the revival does with them."""

    def __init__(self, setup) -> None:
        self.made = 0
        self.names: dict[str, str] = {}
        self.told: list[object] = []
        self.infos: dict[int, SimpleNamespace] = {}
        self.said: list[str] = []
        self.loads: list[tuple] = []
        self.places = SimpleNamespace(
            workers=[self.process("rollout-0"), self.process("rollout-1")],
            loaded={0, 1},
            waiting=set(),
            least=1,
            replace=self.replace,
            arrived=self.arrived,
            check_wait=self.check_wait,
        )
        self.crew = SimpleNamespace(
            places=self.places,
            scorers=SimpleNamespace(
                names=["scorer-0", "scorer-1"], died=lambda name, words, death: self.told.append((name, words))
            ),
            setup=setup,
        )
        self.process("scorer-1")
        self.inside: str | None = None
        book = SimpleNamespace(
            name_of=lambda error: self.names.get(error.actor_id, ""),
            explain=lambda error: f"died {error.actor_id}",
            cause_inside=lambda error: self.inside,
        )
        config = SimpleNamespace(cluster=SimpleNamespace(start_timeout_s=100.0))
        session = SimpleNamespace(crew=self.crew, book=book, config=config)
        self.revival = Revival(
            session,
            lambda *given: self.loads.append(given),
            self.said.append,
            lambda setup: setup,
            Counter(),
            Suspects(),
        )
        self.revival.watch(
            lambda worker: self.told.append(("lost", worker)), lambda *given: self.told.append(("back", *given))
        )

    def process(self, name: str):
        self.made += 1
        self.names[str(self.made)] = name
        number = self.made
        return SimpleNamespace(number=number, setup=SimpleNamespace(remote=lambda setup: ("setup", number)))

    def replace(self, worker: int) -> None:
        self.places.loaded.discard(worker)
        self.places.workers[worker] = self.process(f"rollout-{worker}")

    def arrived(self, worker: int, info):
        before = self.infos.get(worker)
        self.infos[worker] = info
        self.places.loaded.add(worker)
        return before

    def check_wait(self, since: float, there: int) -> None:
        self.told.append(("too few", since, there))

    def die(self, number: int, what: str = "group 0/a") -> None:
        error = ActorDiedError()
        error.actor_id = str(number)
        self.revival.died(ActorDeath(what, error))


def info(pid: int, oom_kills: int = 0):
    return SimpleNamespace(pid=pid, node="here", oom_kills=oom_kills)


@pytest.fixture
def world(tmp_path):
    return World(SimpleNamespace(checkpoint=str(tmp_path), version=7))


def test_a_worker_is_replaced_once_and_told_of(world):
    for _ in range(3):  # calls that it leaves without a reply
        world.die(1)
    assert (world.told, set(world.revival.loading), world.revival.deaths) == ([("lost", 0)], {0}, {"rollout-0": 1})
    ((reference, what, loaded, _),) = world.loads
    assert reference == ("setup", 4)
    assert what.startswith("rollout-0 to load ")
    loaded(info(12))
    assert world.told[-1] == ("back", 0, 7)
    assert not world.revival.loading
    assert world.said == [
        "died 1; another process takes its place, its work is done again",
        "rollout-0 is there again (pid 12, node here)",
    ]


def test_a_checkpoint_that_was_deleted_meanwhile_is_not_the_end(world, tmp_path):
    world.die(1)
    _, _, _, failed = world.loads.pop()
    world.crew.setup = SimpleNamespace(checkpoint=str(tmp_path), version=9)
    tmp_path.rmdir()
    failed(FileNotFoundError("gone"))
    tmp_path.mkdir()
    _, _, loaded, failed = world.loads.pop()
    world.places.loaded.clear()
    with pytest.raises(ValueError, match="another cause"):
        failed(ValueError("another cause"))
    loaded(info(1))
    assert world.told[-1] == ("back", 0, 9)


def test_whoever_dies_three_times_without_having_done_anything_ends_the_run(world):
    world.revival.alive("rollout-0")
    world.die(1)  # it had worked: that does not count
    world.die(4)
    world.die(5)
    with pytest.raises(
        RuntimeError, match=r"rollout-0 died 3 times in a row .*, last during load; the first time: died 4"
    ):
        world.die(6, "load")


def test_one_that_does_something_between_its_deaths_goes_on_for_ever(world):
    for number in (1, *range(4, 20)):
        world.die(number)
        if number % 2:
            world.revival.alive("rollout-0")
    assert world.revival.deaths == {"rollout-0": 17}


def test_a_scorer_is_replaced_and_a_learner_ends_the_run(world):
    world.die(3)
    assert world.told == [("scorer-1", "died 3")]
    assert world.revival.deaths == {"scorer-1": 1}
    assert world.said == ["died 3; another process takes its place, its work is done again"]
    world.names["9"] = "learner"
    with pytest.raises(RuntimeError, match="an actor died during optimiser step 4: died 9"):
        world.die(9, "optimiser step 4")
    with pytest.raises(RuntimeError, match="an actor died during a save"):
        world.die(1000, "a save")  # nobody that is known


def test_a_worker_without_room_joins_when_it_has_while_the_others_go_on(world, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("runtime.recovery.revival.time.monotonic", lambda: now[0])
    monkeypatch.setattr("runtime.recovery.revival.ray.kill", lambda actor: world.told.append(("ended", actor.number)))
    world.die(1)
    assert world.revival.coming == {0}
    world.places.waiting = {0}
    for now[0] in (1.0, 500.0):
        world.revival.look()
    assert world.revival.coming == set()
    assert world.said[-1] == "no node has room for rollout-0: it joins when one has, 1 workers go on"
    assert world.told == [("lost", 0)], "one is enough, and a process that cannot start does not load"
    world.places.waiting, now[0] = set(), 590.0
    world.revival.look()
    now[0] = 601.0
    world.revival.look()
    assert world.told[-1] == ("ended", 4), "it has had room for 101 s, and has not loaded"
    world.loads[-1][2](info(9))
    assert world.told[-1] == ("back", 0, 7)


def test_too_few_workers_with_room_are_waited_for_so_long(world, monkeypatch):
    now = [50.0]
    monkeypatch.setattr("runtime.recovery.revival.time.monotonic", lambda: now[0])
    world.places.least = 2
    world.die(1)
    world.revival.look()
    assert world.told == [("lost", 0)]
    world.places.waiting, now[0] = {0}, 60.0
    world.revival.look()
    now[0] = 70.0
    world.revival.look()
    assert world.told[1:] == [("too few", 60.0, 1)] * 2
    world.places.waiting = set()
    world.revival.look()
    world.places.waiting, now[0] = {0}, 80.0
    world.revival.look()
    assert world.told[-1] == ("too few", 80.0, 1), "the time counts anew"


def test_a_worker_that_cannot_load_is_given_up_while_others_are_enough(world):
    world.die(1)
    world.loads[-1][3](ValueError("another version of the messages"))
    assert (
        world.said[-1] == "rollout-0 could not load and is given up, 1 workers go on: another version of the messages"
    )
    assert not world.revival.loading


@pytest.mark.parametrize(("inside", "kills", "blamed"), [("it crashed", 0, True), (None, 0, False), (None, 1, True)])
def test_what_a_process_died_of_is_blamed_on_its_work_unless_it_came_from_outside(world, inside, kills, blamed):
    """kills: processes that the kernel has ended for lack of memory since the worker loaded."""
    world.infos[0] = info(3)
    world.inside = inside
    suspects = world.revival.suspects
    suspects.sent(0, "a")
    suspects.sent(0, "b")
    world.die(1)
    world.loads[-1][2](info(9, kills))
    suspects.sent(0, "c")
    assert suspects.may_take(0, "a") is not blamed, "who is suspect is alone"


def test_a_process_that_condemned_work_has_ended_does_not_count(world):
    world.inside = "it crashed"
    for number in (1, *range(4, 9)):
        world.revival.suspects.sent(0, f"work {number // 2}")
        world.die(number)
    assert world.revival.deaths == {"rollout-0": 6}


def test_deaths_in_words():
    assert deaths_in_words({}) == ""
    assert (
        deaths_in_words({"scorer": 1, "rollout-0": 2}) == "; 3 processes died and were replaced (rollout-0 2, scorer 1)"
    )


class Watched:
    """Ray's side of a watch: replies that come when they are told to, and who was ended."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.asked, self.ended = 0.0, [], []
        self.replies: dict[object, object] = {}
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watch.ray, "wait", lambda refs, timeout: ([r for r in refs if r in self.replies], []))
        monkeypatch.setattr(watch.ray, "get", lambda ref, timeout: self.replies[ref])
        monkeypatch.setattr(watch.ray, "kill", self.ended.append)
        self.crew = SimpleNamespace(workers=[self.process(), self.process()], waiting=set())
        self.learners = SimpleNamespace(actors=[])
        self.watch = Watch(self.crew, NOBODY, 10.0, 40.0, self.learners)

    def process(self):
        def remote():
            self.asked.append(object())
            return self.asked[-1]

        actor_id = SimpleNamespace(hex=lambda: str(id(remote)))
        sign = SimpleNamespace(remote=remote)
        return SimpleNamespace(stats=sign, beat=sign, _actor_id=actor_id)

    def run(self, seconds: int, answer) -> None:
        for _ in range(seconds):
            self.now += 1
            self.replies |= {ref: answer for ref in self.asked if answer is not None}
            self.watch.look()


def test_who_answers_and_does_not_hang_in_a_visit_is_left_alone(monkeypatch):
    world = Watched(monkeypatch)
    world.run(100, WorkerStats(0, 0, visit_s=9.0))
    assert 50 <= len(world.asked) <= 100, "two workers, every few seconds"
    assert world.ended == []


def test_who_does_not_answer_is_ended_once_and_the_next_one_is_watched_anew(monkeypatch, caplog):
    world = Watched(monkeypatch)
    world.run(39, None)
    assert world.ended == [], "they may still start"
    world.run(1, WorkerStats(0, 0))
    world.run(9, None)
    assert world.ended == []
    world.run(30, None)
    assert world.ended == world.crew.workers
    assert "rollout-1 has not answered for 11 s (cluster.hang_s=10): it is ended" in caplog.text
    world.crew.workers[0] = world.process()
    world.run(39, None)
    assert len(world.ended) == 2
    world.run(9, None)
    assert world.ended[2:] == world.crew.workers[:1]


def test_whose_engine_is_stuck_in_one_visit_is_ended(monkeypatch, caplog):
    world = Watched(monkeypatch)
    world.run(10, WorkerStats(0, 0, visit_s=11.0))
    assert world.ended == world.crew.workers
    assert "rollout-0 has been in one visit of its engine for 11 s" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_where_all_stand_is_said_before_a_process_is_ended_and_never_keeps_it_from_that(monkeypatch, caplog, fails):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    world = Watched(monkeypatch)
    world.crew.workers.pop()
    asked_with: list[int] = []

    def where() -> str:
        asked_with.append(len(world.ended))
        if fails:
            raise OSError("no folder")
        return "rollout-0: engine: waits for a group"

    world.watch = Watch(world.crew, NOBODY, 10.0, 40.0, world.learners, where)
    world.run(60, None)
    (ending,) = [thread for thread in threading.enumerate() if thread.name == "watch"] or [None]
    if ending is not None:
        ending.join(30)
    assert asked_with == [0]
    assert world.ended == world.crew.workers
    assert ("engine: waits for a group" in caplog.text) is not fails


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_of_the_learner_that_does_not_answer_is_ended(monkeypatch, caplog, ranks):
    world = Watched(monkeypatch)
    world.crew.workers.clear()
    world.learners.actors += [world.process() for _ in range(ranks)]
    world.run(20, WorkerStats(0, 0))  # any answer is one
    assert world.ended == []
    world.learners.actors[-1].beat.remote = object  # nobody will answer that
    world.run(14, WorkerStats(0, 0))
    assert world.ended == world.learners.actors[-1:]
    name = "learner" if ranks == 1 else "learner-1"
    assert f"{name} has not answered for 11 s (cluster.hang_s=10): it is ended" in caplog.text


def test_rays_own_failures_end_a_wait_in_words(monkeypatch):
    def get(*_, **__):
        raise OutOfMemoryError("node 10.0.0.1 ran out of memory")

    monkeypatch.setattr(events.ray, "get", get)
    monkeypatch.setattr(events.ray, "wait", lambda refs, num_returns, timeout: (refs[:1], refs[1:]))
    said = r"the scores of 0/a failed: OutOfMemoryError: .*node 10\.0\.0\.1 ran out of memory"
    with pytest.raises(RuntimeError, match=said):
        wait_for("reference", 1.0, "the scores of 0/a")
    waiting = Events(1.0, StopSignal(), lambda death: None)
    waiting.expect("reference", "the scores of 0/a", print)
    with pytest.raises(RuntimeError, match=said):
        waiting.wait()


def test_an_actor_that_rays_memory_monitor_ended_has_died(monkeypatch):
    job = JobID.from_int(1)
    parent = TaskID.for_fake_task(job)
    actor = ActorID.of(job, parent, 3)
    reference = ObjectRef(TaskID.for_actor_task(job, parent, 1, actor).binary() + b"\1\0\0\0")
    assert reference.task_id().actor_id() == actor
    error = OutOfMemoryError("memory on the node was at 97 %")
    death = death_of(error, reference)
    assert death.actor_id == actor.hex()
    assert str(death) == "its node ran out of memory: memory on the node was at 97 %"
    assert death_of(RuntimeError(), reference) is None

    def get(*_, **__):
        raise error

    monkeypatch.setattr(events.ray, "get", get)
    with pytest.raises(ActorLostError, match="its node ran out of memory"):
        wait_for(reference, 1.0, "the scores of 0/a")


def test_a_call_with_a_limit_of_its_own_is_waited_for_as_long_as_that(monkeypatch):
    now = [0.0]

    def wait(refs, num_returns, timeout):
        now[0] += timeout
        return ([refs[0]], []) if now[0] > 30 else ([], refs)

    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(events.ray, "wait", wait)
    monkeypatch.setattr(events.ray, "get", lambda *_, **__: "written")
    found = []
    waiting = Events(5.0, StopSignal(), lambda death: None)
    waiting.expect("saved", "the checkpoint of step 2", found.append, own_limit=True)
    while not found:
        waiting.wait()  # returns now and then: nothing else has a limit
    assert (found, now[0] > 30) == (["written"], True)
    now[0] = 0.0
    waiting.expect("saved", "the checkpoint of step 2", found.append, own_limit=True)
    waiting.expect("step", "optimiser step 3", found.append)
    with pytest.raises(TimeoutError, match=r"nothing finished of: the checkpoint of step 2; optimiser step 3"):
        waiting.wait()


def test_whoever_waits_for_one_call_looks_after_the_others_meanwhile(monkeypatch):
    now, looks = [0.0], []

    def wait(refs, timeout):
        now[0] += timeout
        return (refs, []) if now[0] > 3 else ([], refs)

    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(events.ray, "wait", wait)
    monkeypatch.setattr(events.ray, "get", lambda reference, timeout: timeout)
    assert wait_for("reference", 10.0, "its pid", look=lambda: looks.append(now[0])) == 6.0
    assert looks == [0.0, 1.0, 2.0, 3.0]


def test_a_step_is_made_again_only_if_its_one_rank_could_not_fetch():
    lost, other = ObjectLostError.__new__(ObjectLostError), ValueError("another cause")
    LearnerGroup([None]).check_unfetched(lost)
    with pytest.raises(ValueError, match="another cause"):
        LearnerGroup([None]).check_unfetched(other)
    with pytest.raises(ObjectLostError):
        LearnerGroup([None, None]).check_unfetched(lost)

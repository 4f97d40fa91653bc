"""Who gets which group, simulated over random schedules in which workers are lost and come back."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.age import AgeBound
from rl.groups.buffer import GroupBuffer
from rl.groups.dispatch import KEPT, Assignment, Dispatcher
from rl.results import ReadyGroup
from rl.versions import VersionLedger
from runtime.recovery.suspects import Suspects
from runtime.task_order import epochs, group_id
from streams.messages import GroupSummary
from tests.support.configs import composed
from tests.support.tasks import clip_task

BASE = composed("algorithm.group_size=2")
TASKS = tuple(clip_task(name) for name in "abc")
PLENTY = 10**6


def configured(limit: int, *, deterministic: bool = False):
    """limit: groups that a worker may have under way (one, if deterministic)."""
    algorithm = replace(BASE.algorithm, mode="sync" if deterministic else "async")
    rollout = replace(BASE.rollout, max_streams=2 * limit)
    return replace(BASE, deterministic=deterministic, algorithm=algorithm, rollout=rollout)


class Simulation:
    """Workers, scorer and learner around a dispatcher, with accounts of their own.

    calls: what each worker has been sent and has not answered. reading: kept groups that are not there yet.
    """

    def __init__(
        self,
        limits: AgeBound,
        workers: int,
        limit: int,
        *,
        deterministic: bool,
        done: int = 0,
        kept: tuple[int, ...] = (),
    ) -> None:
        """kept: places of groups in the source that a checkpoint has, as old as they may have been."""
        self.limits, self.limit, self.done = limits, 1 if deterministic else limit, done
        self.deterministic = deterministic
        self.buffer: GroupBuffer[ReadyGroup] = GroupBuffer(limits)
        self.ledger = VersionLedger(workers, limits.lag)
        config = configured(limit, deterministic=deterministic)
        order = list(itertools.islice(epochs(TASKS, 0), limits.capacity))
        self.kept = {group_id(*order[place]): place // limits.batch - limits.bound for place in kept}
        self.dispatch = Dispatcher(config, self.buffer, self.ledger, epochs(TASKS, 0), done, kept=self.kept)
        self.version = 0
        self.lives = [0] * workers
        self.lost: set[int] = set()
        self.calls: list[tuple[Assignment, int]] = []
        self.reading: list[Assignment] = []
        self.stale: list[tuple[Assignment, int]] = []
        self.scoring: list[tuple[Assignment, GroupSummary]] = []
        self.group_of: dict[int, str] = {}
        self.oldest: dict[int, int] = {}
        self.taken_back: set[int] = set()
        self.ended: Counter[int] = Counter()
        self.trained: list[int] = []
        self.in_training: list[int] = []
        self.attempts: Counter[int] = Counter()

    def alive(self, assignment: Assignment) -> bool:
        lives = [assignment.life, *([assignment.maker] if assignment.maker else [])]
        return all(life == KEPT or self.lives[life.worker] == life.number for life in lives)

    def send(self) -> bool:
        assignment = self.dispatch.next(self.version, PLENTY)
        if assignment is None:
            return False
        ticket, worker = assignment.ticket, assignment.worker
        if self.taken_back:
            assert ticket == min(self.taken_back), "what was lost goes first, in the order of admission"
            self.taken_back.remove(ticket)
            assert assignment.group == self.group_of[ticket], "a ticket is one group's for good"
        else:
            assert ticket == len(self.group_of)
            self.group_of[ticket] = assignment.group
            assert (assignment.life == KEPT) == (assignment.group in self.kept)
            if assignment.life == KEPT:
                self.reading.append(assignment)
                self.check()
                return True
        self.attempts[ticket] += 1
        assert worker not in self.lost
        assert self.version - self.ledger.running[worker] <= self.limits.lag
        assert assignment.life.number == self.lives[worker]
        if assignment.features is not None:
            assert assignment.maker == assignment.features[1], "who was given features is not their maker"
        assert self.alive(assignment), "features are sent along only while their maker lives"
        if self.deterministic:
            assert worker == (self.done + ticket) % len(self.lives)
        self.calls.append((assignment, self.ledger.running[worker]))
        self.check()
        return True

    def read(self, assignment: Assignment, *, damaged: bool) -> None:
        """A kept group is there, or cannot be read."""
        self.reading.remove(assignment)
        if damaged:
            self.dispatch.again(assignment)
            self.taken_back.add(assignment.ticket)
            return
        summary = GroupSummary(assignment.group, assignment.task.id, 0, oldest_version=self.kept[assignment.group])
        self.dispatch.fulfil(assignment, ReadyGroup(summary, assignment, ()))

    def reply(self, call: tuple[Assignment, int], *, failed: bool) -> None:
        assignment, oldest = call
        self.calls.remove(call)
        features = assignment.features or (assignment.task.id, assignment.life)
        summary = GroupSummary(
            assignment.group,
            assignment.task.id,
            assignment.worker,
            oldest_version=oldest,
            features=None if failed else features,
            feature_bytes=1,
        )
        # A living worker may answer about a group that the loss of another one took back.
        expected = self.alive(assignment) and assignment.ticket not in self.taken_back
        latest = self.dispatch.returned(assignment, summary)
        if not expected:
            assert not latest
        if not latest:
            return
        if failed:
            self.dispatch.drop(assignment)
            self.ended[assignment.ticket] += 1
            return
        self.scoring.append((assignment, summary))

    def late_reply(self, call: tuple[Assignment, int]) -> None:
        """From a worker that only seemed to be gone."""
        self.stale.remove(call)
        summary = GroupSummary(call[0].group, call[0].task.id, call[0].worker, features="late", feature_bytes=1)
        assert not self.dispatch.returned(call[0], summary)
        with pytest.raises(AssertionError, match="was assigned again"):
            self.dispatch.drop(call[0])

    def score(self, entry: tuple[Assignment, GroupSummary]) -> None:
        self.scoring.remove(entry)
        assignment, summary = entry
        if self.dispatch.is_latest(assignment):
            assert self.alive(assignment)
            self.oldest[assignment.ticket] = summary.oldest_version
            self.dispatch.fulfil(assignment, ReadyGroup(summary, assignment, ()))

    def train(self) -> bool:
        if self.in_training or not self.ledger.may_publish():
            return False
        groups = self.buffer.next_batch()
        if groups is None:
            return False
        for group in groups:
            assignment = group.payload
            assert self.alive(assignment), "a group is trained only while its media are there"
            self.buffer.check_age(self.version, group.summary.oldest_version, group.summary.group)
            self.ended[assignment.ticket] += 1
            self.in_training.append(assignment.ticket)
        return True

    def step_done(self) -> None:
        if self.in_training:
            self.trained += self.in_training
            self.in_training = []
            self.version += 1
            self.buffer.trained()
            self.ledger.publish(self.version)

    def unfetched(self) -> None:
        """The learner could not fetch the media of its batch."""
        assert list(self.dispatch.reissue_batch()) == self.in_training
        self.ended.subtract(self.in_training)
        self.taken_back |= set(self.in_training)
        self.in_training = []

    def swap(self) -> None:
        due = self.ledger.next_fetches()
        for worker in [*due, *self.ledger.fetching]:
            if worker in self.ledger.fetching:
                self.ledger.swapped(worker, self.ledger.fetching[worker])

    def lose(self, worker: int) -> None:
        gone = [call for call in self.calls if call[0].worker == worker]
        self.calls = [call for call in self.calls if call[0].worker != worker]
        self.stale += gone
        # By the simulation's own account: what needs this life, and is not trained or dropped yet.
        untrained = [t for t in self.group_of if not self.ended[t] and t not in self.taken_back]
        latest = {
            a.ticket: a
            for a, _ in [*self.stale, *self.calls, *self.scoring, *((r, 0) for r in self.reading)]
            if self.dispatch.is_latest(a)
        }
        latest |= {g.payload.ticket: g.payload for g in self.buffer._waiting.values() if g is not None}
        self.lives[worker] += 1
        needed = {t for t in untrained if not self.alive(latest[t])}
        assert set(self.dispatch.reissue(worker)) == needed
        assert self.dispatch.reissue(worker) == (), "once taken back, they are nobody's"
        self.lives[worker] += 1
        self.taken_back |= needed
        self.lost.add(worker)
        assert worker not in self.ledger.fetching
        self.check()

    def restore(self, worker: int) -> None:
        self.lost.remove(worker)
        # With what the stage began with, or with a newer checkpoint.
        self.dispatch.restored(worker, self.ledger.published if self.version % 2 else 0)

    def check(self) -> None:
        under_way = Counter(assignment.worker for assignment, _ in self.calls)
        assert max(under_way.values(), default=0) <= self.limit
        assert self.buffer.untrained <= self.limits.capacity
        assert max(self.ended.values(), default=0) <= 1
        assert self.trained == sorted(self.trained)

    def drain(self) -> None:
        """Everything that is under way comes to its end, and everything admitted is trained or dropped."""
        for worker in sorted(self.lost):
            self.restore(worker)
        for _ in range(10_000):
            self.swap()
            moved = self.send()
            for call in list(self.calls):
                self.reply(call, failed=False)
                moved = True
            for assignment in list(self.reading):
                self.read(assignment, damaged=False)
                moved = True
            for entry in list(self.scoring):
                self.score(entry)
                moved = True
            # A step that ends makes room for the next: that is progress, too.
            moved |= self.train() or bool(self.in_training)
            self.step_done()
            if not moved or len(self.group_of) > 200:
                break
        self.check()


ACTIONS = (
    *("send", "send", "send", "reply", "reply", "score", "score", "fail"),
    *("train", "done", "swap", "lose", "restore", "late", "unfetched", "read", "damaged"),
)


@given(
    st.tuples(st.integers(1, 4), st.integers(0, 8), st.integers(0, 2)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 5),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_in_any_schedule_of_losses_every_ticket_ends_once_within_the_age_bound(
    numbers, workers, limit, deterministic, done, data
):
    batch, more, lag = numbers
    limits = AgeBound(capacity=batch, batch=batch, lag=0) if deterministic else AgeBound(batch + more, batch, lag)
    kept = data.draw(st.sets(st.integers(0, limits.capacity - 1)), label="kept")
    world = Simulation(limits, workers, limit, deterministic=deterministic, done=done, kept=tuple(kept))
    for _ in range(data.draw(st.integers(1, 80), label="events")):
        action = data.draw(st.sampled_from(ACTIONS))
        if action == "send":
            world.send()
        elif action in ("reply", "fail") and world.calls:
            world.reply(data.draw(st.sampled_from(world.calls)), failed=action == "fail")
        elif action == "late" and world.stale:
            world.late_reply(data.draw(st.sampled_from(world.stale)))
        elif action in ("read", "damaged") and world.reading:
            world.read(data.draw(st.sampled_from(world.reading)), damaged=action == "damaged")
        elif action == "score" and world.scoring:
            world.score(data.draw(st.sampled_from(world.scoring)))
        elif action == "train":
            world.train()
        elif action == "done":
            world.step_done()
        elif action == "unfetched" and world.in_training:
            world.unfetched()
        elif action == "swap":
            world.swap()
        elif action == "lose":
            alive = sorted(set(range(workers)) - world.lost)
            if alive:
                world.lose(data.draw(st.sampled_from(alive), label="worker"))
        elif action == "restore" and world.lost:
            world.restore(data.draw(st.sampled_from(sorted(world.lost)), label="worker"))
        world.check()
    last = len(world.group_of)
    world.drain()
    assert not world.taken_back
    assert all(world.ended[ticket] == 1 for ticket in range(last)), "fulfilled and trained, or dropped: once each"
    assert len(world.trained) == len(set(world.trained))


def dispatcher(*, workers: int = 2, limit: int = 2, capacity: int = 8, deterministic: bool = False, done: int = 0):
    limits = AgeBound(capacity, 2, 0 if deterministic else 1)
    ledger = VersionLedger(workers, limits.lag)
    buffer: GroupBuffer[ReadyGroup] = GroupBuffer(limits)
    return Dispatcher(configured(limit, deterministic=deterministic), buffer, ledger, epochs(TASKS, 0), done), buffer


def reply(assignment: Assignment, features=None) -> GroupSummary:
    return GroupSummary(
        assignment.group, assignment.task.id, assignment.worker, features=features, feature_bytes=1 if features else 0
    )


def all_of(dispatch) -> list[Assignment]:
    return list(iter(lambda: dispatch.next(0, PLENTY), None))


def test_the_worker_with_the_fewest_groups_gets_the_next_up_to_its_limit():
    dispatch, _ = dispatcher()
    sent = all_of(dispatch)
    assert [a.worker for a in sent] == [0, 1, 0, 1]
    dispatch.returned(sent[1], reply(sent[1]))
    assert [a.worker for a in all_of(dispatch)] == [1]


def test_no_more_groups_are_admitted_than_the_stage_still_has_to_train():
    dispatch, _ = dispatcher()
    assert dispatch.next(0, left=1) is not None
    assert dispatch.next(0, left=1) is None


def test_a_deterministic_group_waits_for_its_own_worker_after_a_resume_and_after_a_loss():
    dispatch, _ = dispatcher(workers=3, capacity=2, deterministic=True, done=4)
    first, second = all_of(dispatch)
    assert (first.worker, second.worker) == (1, 2)
    assert dispatch.reissue(1) == (0,)
    assert dispatch.next(0, PLENTY) is None, "not to another worker, and nothing overtakes it"
    dispatch.restored(1, 0)
    again = dispatch.next(0, PLENTY)
    assert (again.worker, again.ticket, again.group) == (1, 0, first.group)


def test_a_lost_groups_place_in_the_order_stays_and_its_request_is_the_same():
    dispatch, buffer = dispatcher()
    first, second, *_ = all_of(dispatch)
    for assignment in (first, second):
        assert dispatch.returned(assignment, reply(assignment))
        dispatch.fulfil(assignment, ReadyGroup(reply(assignment), None, ()))
    # Finished and scored, but what it holds is in the memory of worker 0.
    assert dispatch.reissue(0) == (0, 2)
    assert buffer.next_batch() is None, "the second must not overtake the first"
    again = dispatch.next(0, PLENTY)
    assert (again.ticket, again.worker) == (0, 1)
    assert dispatch.request(again) == dispatch.request(first)
    dispatch.returned(again, reply(again))
    dispatch.fulfil(again, ReadyGroup(reply(again), "again", ()))
    assert [group.payload for group in buffer.next_batch()] == ["again", None]


def test_features_go_along_until_their_maker_is_lost_and_so_do_groups_that_were_given_them():
    dispatch, _ = dispatcher(limit=4)
    first = dispatch.next(0, PLENTY)
    dispatch.returned(first, reply(first, features="clip"))
    dispatch.drop(first)
    later = list(itertools.islice(iter(lambda: dispatch.next(0, PLENTY), None), 5))
    given = [a for a in later if a.task == first.task]
    assert given, "three tasks, five groups"
    assert all((a.features, a.maker) == ("clip", first.life) for a in given)
    on_others = {a.ticket for a in given if a.worker != first.worker}
    lost = set(dispatch.reissue(first.worker))
    assert on_others <= lost
    assert lost == on_others | {a.ticket for a in later if a.worker == first.worker}
    assert dispatch.next(0, PLENTY).features is None


def test_a_group_beside_the_buffer_is_the_next_of_the_source_and_takes_no_ticket():
    dispatch, buffer = dispatcher()
    first = dispatch.next(0, PLENTY)
    extra = dispatch.extra("published-0")
    assert extra.group.startswith("published-0/")
    assert extra.task != first.task
    assert buffer.admitted == 1
    assert dispatch.next(0, PLENTY).ticket == 1


def test_a_group_whose_features_were_lost_unseen_is_rolled_out_again_without_any():
    dispatch, _ = dispatcher(workers=1, limit=8)
    first = dispatch.next(0, PLENTY)
    dispatch.returned(first, reply(first, features="clip"))
    dispatch.drop(first)
    given, other, *_ = (a for a in all_of(dispatch) if a.features is not None)
    dispatch.returned(given, reply(given))
    dispatch.again(given)
    dispatch.returned(other, reply(other, features="another"))
    again = dispatch.next(0, PLENTY)
    assert (again.ticket, again.group, again.features) == (given.ticket, given.group, None)
    assert not dispatch.is_latest(given)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_group_that_ends_its_workers_is_given_up_in_all_epochs_and_its_fellows_are_not(deterministic):
    config, buffer, suspects = configured(3, deterministic=deterministic), GroupBuffer(AgeBound(6, 2, 0)), Suspects()
    ledger = VersionLedger(2, PLENTY)
    dispatch = Dispatcher(config, buffer, ledger, epochs(TASKS, 0), 0, suspects)
    under_way: dict[int, list[Assignment]] = {0: [], 1: []}
    given_up, trained, version, deaths = [], [], 0, 0
    while len(trained) < 20:
        while (assignment := dispatch.next(version, PLENTY)) is not None:
            if (why := suspects.condemned(assignment.group)) is not None:
                given_up.append((assignment.group, why))
                assert dispatch.returned(assignment, GroupSummary(assignment.group, "b", assignment.worker, failed=why))
                dispatch.drop(assignment)
                continue
            suspects.sent(assignment.worker, assignment.group)
            under_way[assignment.worker].append(assignment)
            beside = [other.task.id for other in under_way[assignment.worker]]
            assert len(beside) == 1 or "b" not in beside or not deaths, "a suspect is alone"
        for worker, sent in under_way.items():
            if any(assignment.task.id == "b" for assignment in sent):
                suspects.died(worker, "it crashed")
                dispatch.reissue(worker)
                dispatch.restored(worker, version)
            else:
                for assignment in sent:
                    suspects.over(worker, assignment.group)
                    summary = GroupSummary(assignment.group, assignment.task.id, worker)
                    assert dispatch.returned(assignment, summary)
                    dispatch.fulfil(assignment, ReadyGroup(summary, None, ()))
            under_way[worker] = []
        while (batch := buffer.next_batch()) is not None:
            buffer.trained()
            trained += [group.summary.group for group in batch]
            version += 1
            ledger.published = version
            ledger.running = dict.fromkeys((0, 1), version)
    assert len(set(trained)) == len(trained)
    assert {group.partition("/")[2] for group in trained} == {"a", "c"}
    assert all(why.startswith("it ended the workers that had it alone, ") for _, why in given_up)
    assert len(given_up) >= 5
    assert deaths <= 4, "one beside others, and two epochs at once on both workers"
    assert {group.partition("/")[2] for group, _ in given_up} == {"b"}

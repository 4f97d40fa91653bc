"""The sample buffer: its age bound, simulated over random schedules, and shown to be attained."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.age import AgeBound
from rl.groups.buffer import GroupBuffer

pytestmark = pytest.mark.smoke


class Simulation:
    """A learner, workers that lag by at most `lag` versions, and the buffer between them. A group is (ticket, oldest)."""

    def __init__(self, limits: AgeBound) -> None:
        self.limits = limits
        self.buffer = GroupBuffer(limits)
        self.version = 0
        self.training = False
        self.on_the_way: dict[int, int] = {}
        self.dropped: set[int] = set()
        self.trained: list[int] = []
        self.ages: list[int] = []
        self.admitted = 0

    def admit(self, lag: int) -> bool:
        if not self.buffer.may_admit():
            with pytest.raises(RuntimeError, match="the capacity is the age bound"):
                self.buffer.admit()
            return False
        ticket = self.buffer.admit()
        assert ticket == self.admitted, "tickets count admissions"
        self.admitted += 1
        self.on_the_way[ticket] = max(0, self.version - min(lag, self.limits.lag))
        return True

    def fulfil(self, ticket: int) -> None:
        self.buffer.fulfil(ticket, (ticket, self.on_the_way.pop(ticket)))

    def drop(self, ticket: int) -> None:
        del self.on_the_way[ticket]
        self.buffer.drop(ticket)
        self.dropped.add(ticket)

    def start_training(self) -> bool:
        if self.training:
            return False
        batch = self.buffer.next_batch()
        if batch is None:
            return False
        assert len(batch) == self.limits.batch
        for ticket, oldest in batch:
            self.ages.append(self.buffer.check_age(self.version, oldest, str(ticket)))
            self.trained.append(ticket)
        self.training = True
        return True

    def finish_training(self) -> None:
        if self.training:
            self.training = False
            self.version += 1
            self.buffer.trained()

    def check(self) -> None:
        in_training = self.limits.batch if self.training else 0
        done = len(self.trained) - in_training
        assert self.buffer.untrained == self.admitted - done - len(self.dropped)
        assert self.buffer.untrained <= self.limits.capacity
        assert self.buffer.ready <= self.buffer.untrained - in_training
        assert max(self.ages, default=0) <= self.limits.bound
        # Admission order without gaps: whoever is missing below the newest trained group was dropped.
        assert self.trained == sorted(set(self.trained))
        missing = set(range(max(self.trained, default=-1) + 1)) - set(self.trained)
        assert missing <= self.dropped


LIMITS = st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 3)).map(
    lambda v: AgeBound(capacity=v[0] + v[1], batch=v[0], lag=v[2])
)


@given(LIMITS, st.data())
@settings(max_examples=150, deadline=None)
def test_no_schedule_exceeds_the_age_bound_or_the_capacity_or_overtakes(limits, data):
    simulation = Simulation(limits)
    actions = st.sampled_from(["admit", "admit", "fulfil", "fulfil", "drop", "start", "finish"])
    for _ in range(data.draw(st.integers(1, 70), label="events")):
        action = data.draw(actions)
        on_the_way = sorted(simulation.on_the_way)
        if action == "admit":
            simulation.admit(data.draw(st.integers(0, limits.lag), label="lag"))
        elif action in ("fulfil", "drop") and on_the_way:
            getattr(simulation, action)(data.draw(st.sampled_from(on_the_way), label="ticket"))
        elif action == "start":
            simulation.start_training()
        elif action == "finish":
            simulation.finish_training()
        simulation.check()


@given(LIMITS, st.integers(0, 30), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_one_slow_group_stops_training_until_it_arrives_and_never_ages_beyond_the_bound(limits, slow, random):
    simulation = Simulation(limits)
    while simulation.admitted <= slow or len(simulation.trained) < slow + 1:
        while simulation.admit(random.randint(0, limits.lag)):
            pass
        quick = [ticket for ticket in simulation.on_the_way if ticket != slow]
        random.shuffle(quick)
        for ticket in quick:
            simulation.fulfil(ticket)
        if not simulation.start_training():
            # Only the slow group can be missing: everything behind it is ready and has to wait.
            assert min(simulation.on_the_way) == slow
            assert all(ticket < slow for ticket in simulation.trained)
            assert not simulation.buffer.may_admit()
            simulation.check()
            simulation.fulfil(slow)
            assert simulation.start_training()
        simulation.finish_training()
        simulation.check()
    assert slow in simulation.trained


@given(LIMITS)
@settings(max_examples=100, deadline=None)
def test_the_age_bound_is_attained(limits):
    simulation = Simulation(limits)
    for _ in range(limits.lag):
        for _ in range(limits.batch):
            simulation.admit(0)
        for ticket in list(simulation.on_the_way):
            simulation.fulfil(ticket)
        assert simulation.start_training()
        simulation.finish_training()
    while simulation.admit(limits.lag):
        pass
    last = simulation.admitted - 1
    while last not in simulation.trained:
        for ticket in list(simulation.on_the_way):
            simulation.fulfil(ticket)
        if simulation.start_training():
            simulation.finish_training()
        while simulation.admit(0):
            pass
        simulation.check()
    assert max(simulation.ages) == limits.bound


def test_the_bound_is_what_stands_before_a_group_plus_the_lag():
    assert AgeBound(1, 1, 0).bound == 0
    assert AgeBound(8, 8, 0).bound == 0
    assert AgeBound(9, 8, 0).bound == 1
    assert AgeBound(16, 8, 1).bound == 2
    assert AgeBound(10, 5, 1).bound == 2


def test_an_age_above_the_bound_is_an_error_that_names_the_group():
    buffer = GroupBuffer(AgeBound(10, 5, 1))
    assert buffer.check_age(7, 5, "0/a") == 2
    with pytest.raises(RuntimeError, match="group 0/a has age 3, above the bound 2"):
        buffer.check_age(8, 5, "0/a")


def test_a_ready_group_waits_for_an_earlier_one_and_a_drop_lets_it_pass():
    buffer = GroupBuffer(AgeBound(4, 2, 0))
    first, second, third = buffer.admit(), buffer.admit(), buffer.admit()
    buffer.fulfil(second, "second")
    buffer.fulfil(third, "third")
    assert buffer.ready == 2
    assert buffer.next_batch() is None
    buffer.drop(first)
    assert buffer.next_batch() == ["second", "third"]


def test_a_batch_in_training_still_fills_the_capacity():
    buffer = GroupBuffer(AgeBound(2, 2, 0))
    for ticket in (buffer.admit(), buffer.admit()):
        buffer.fulfil(ticket, str(ticket))
    assert buffer.next_batch() == ["0", "1"]
    assert buffer.untrained == 2
    assert not buffer.may_admit()
    buffer.trained()
    assert buffer.untrained == 0
    assert buffer.may_admit()


@pytest.mark.parametrize(
    ("capacity", "batch", "lag", "key"),
    [
        (4, 0, 0, "algorithm.groups_per_step=0"),
        (4, -1, 0, "algorithm.groups_per_step=-1"),
        (3, 4, 0, "algorithm.groups_in_flight=3"),
        (4, 4, -1, "weights.max_lag=-1"),
    ],
)
def test_impossible_limits_are_refused_by_their_config_key(capacity, batch, lag, key):
    with pytest.raises(ValueError, match=key):
        AgeBound(capacity, batch, lag)

"""Which worker rolls out which group, and what becomes of the groups of a worker that is lost. Pure: it calls no actor.

A group gets a ticket of the buffer when it is admitted, and an assignment to a worker whenever it is sent. A lost
worker takes with it whatever it held in memory: groups under way, and the media of groups that it has finished. All
of these that are not trained yet are assigned again, under their old tickets.

Invariants:
* every ticket is fulfilled or dropped exactly once, by its latest assignment: replies to earlier ones are void;
* groups that were lost are assigned before any new one is admitted, in the order of their tickets;
* no worker has more than `limit` groups under way, and none gets a group while it is lost or lags too far behind;
* `deterministic`: group number n belongs to worker n mod W, which has one group at a time, also when it is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conf.schema import RunConfig
from rl.buffer import GroupBuffer
from rl.results import ReadyGroup
from rl.versions import VersionLedger
from runtime.task_order import group_id
from streams.messages import GroupSummary, RolloutTask
from streams.support.byte_cache import ByteBudgetCache
from streams.task import Plan, StreamTask


@dataclass(frozen=True)
class Life:
    """One process of a worker: what it put into the object store is gone with it. number: how many were lost before."""

    worker: int
    number: int


@dataclass(frozen=True)
class Assignment:
    """One sending of a group to a worker.

    Attributes:
        life: the worker's; it ends when the worker is lost.
        features: a reference to the encoded clip that is sent along; None if the worker is to encode it.
        maker: the life in which `features` were made; None without features.
    """

    ticket: int
    epoch: int
    task: StreamTask
    plan: Plan
    life: Life
    features: Any = None
    maker: Life | None = None

    @property
    def worker(self) -> int:
        return self.life.worker

    @property
    def group(self) -> str:
        return group_id(self.epoch, self.task)


class Dispatcher:
    """Hands out the tickets of `buffer`. The loop sends what `next` returns, and tells what came of it."""

    def __init__(
        self,
        config: RunConfig,
        buffer: GroupBuffer[ReadyGroup],
        ledger: VersionLedger,
        source: Iterator[tuple[int, StreamTask]],
        done: int = 0,
    ) -> None:
        """source: (epoch, task) of the groups still to come. done: groups that the stage was through with at the start."""
        self._config, self._buffer, self._ledger, self._source = config, buffer, ledger, source
        self._done_before = done
        self._limit = 1 if config.deterministic else max(1, config.rollout.max_streams // config.algorithm.group_size)
        self._load = [0] * ledger.workers
        self._lives = [Life(worker, 0) for worker in range(ledger.workers)]
        self._lost: set[int] = set()
        self._latest: dict[int, Assignment] = {}
        self._returned: dict[int, Assignment] = {}
        # References keep features alive in the object store: the budget bounds what a long dataset may pin there.
        self._features: ByteBudgetCache[tuple[Any, Life]] = ByteBudgetCache(config.data.cache_mb * 2**20)
        self.clips: set[str] = set()

    # --- out ------------------------------------------------------------------------------------------------------

    def next(self, version: int, left: int) -> Assignment | None:
        """Assign the next group; None while no worker may have it, or while the buffer is full.

        version: where the learner is. left: groups that the stage still has to train, those under way included.
        """
        if self._returned:
            ticket = min(self._returned)
            worker = self._worker_for(ticket, version)
            if worker is None:
                return None
            lost = self._returned.pop(ticket)
            return self._assign(ticket, lost.epoch, lost.task, lost.plan, worker)
        if not self._buffer.may_admit() or self._buffer.untrained >= left:
            return None
        worker = self._worker_for(self._buffer.admitted, version)
        if worker is None:
            return None
        epoch, task = next(self._source)
        return self._assign(self._buffer.admit(), epoch, task, self._config.data.plan_of(task), worker)

    def request(self, assignment: Assignment) -> RolloutTask:
        """What the worker is asked for."""
        return self._request(assignment.group, assignment.task, assignment.plan, assignment.features)

    def extra(self, name: str) -> RolloutTask:
        """One more group of the source, called `name`, that is rolled out beside the buffer: it is not trained on."""
        _, task = next(self._source)
        return self._request(f"{name}/{task.id}", task, self._config.data.plan_of(task), self._kept(task)[0])

    # --- back -----------------------------------------------------------------------------------------------------

    def returned(self, assignment: Assignment, summary: GroupSummary) -> bool:
        """Note a worker's reply. False if the group was assigned again meanwhile: the reply is then to be ignored."""
        if self._lives[assignment.worker] == assignment.life:
            self._load[assignment.worker] -= 1
        if not self.is_latest(assignment):
            return False
        if summary.features is not None:
            # A worker passes on the very reference that it was given.
            kept = (summary.features, assignment.maker or assignment.life)
            self._features.put(assignment.task.id, kept, summary.feature_bytes)
        return True

    def is_latest(self, assignment: Assignment) -> bool:
        """Whether what comes of this assignment counts: its group has not been taken back, nor is it done with."""
        return self._latest.get(assignment.ticket) is assignment

    def fulfil(self, assignment: Assignment, group: ReadyGroup) -> None:
        """Make the group of a latest assignment ready for training."""
        assert self.is_latest(assignment), f"group {assignment.group} was assigned again"
        self._buffer.fulfil(assignment.ticket, group)

    def drop(self, assignment: Assignment) -> None:
        """Give up the place of a latest assignment's group."""
        assert self.is_latest(assignment), f"group {assignment.group} was assigned again"
        self._buffer.drop(assignment.ticket)
        del self._latest[assignment.ticket]

    # --- lost workers ---------------------------------------------------------------------------------------------

    def reissue(self, worker: int) -> tuple[int, ...]:
        """Take back all untrained groups that need `worker`, which is lost, and give it none until it is `restored`.

        Returns their tickets; `next` assigns them again. Groups in training are not among them: their step decides.
        """
        self._lives[worker] = Life(worker, self._lives[worker].number + 1)
        self._load[worker] = 0
        self._lost.add(worker)
        taken = {
            ticket: assignment
            for ticket, assignment in self._latest.items()
            if self._buffer.waits(ticket) and not self._intact(assignment)
        }
        for ticket in taken:
            self._buffer.reopen(ticket)
            del self._latest[ticket]
        self._returned |= taken
        return tuple(sorted(taken))

    def restored(self, worker: int) -> None:
        """Give groups to a worker again that was lost, and that runs once more."""
        self._lost.remove(worker)

    # --- which worker ---------------------------------------------------------------------------------------------

    def _worker_for(self, ticket: int, version: int) -> int | None:
        """Group number n's own worker if runs are deterministic, else the one with the fewest groups; if it has room."""
        workers = range(len(self._load))
        if self._config.deterministic:
            own = (self._done_before + ticket) % len(workers)
            workers = range(own, own + 1)
        free = [
            w
            for w in workers
            if self._load[w] < self._limit and w not in self._lost and self._ledger.may_work(w, version)
        ]
        return min(free, key=lambda w: self._load[w], default=None)

    def _assign(self, ticket: int, epoch: int, task: StreamTask, plan: Plan, worker: int) -> Assignment:
        assignment = Assignment(ticket, epoch, task, plan, self._lives[worker], *self._kept(task))
        # What is trained or dropped waits no longer: it is forgotten here, where the new ones come in.
        self._latest = {t: a for t, a in self._latest.items() if self._buffer.waits(t)} | {ticket: assignment}
        self._load[worker] += 1
        self.clips.add(task.id)
        return assignment

    def _request(self, group: str, task: StreamTask, plan: Plan, features: Any) -> RolloutTask:
        return RolloutTask(
            group=group,
            task=task,
            plan=plan,
            streams=self._config.algorithm.group_size,
            temperature=self._config.rollout.temperature,
            features=features,
        )

    def _kept(self, task: StreamTask) -> tuple[Any, Life | None]:
        """(features, their maker) of the task's clip, (None, None) if nobody alive has made them."""
        features, maker = self._features.get(task.id) or (None, None)
        return (features, maker) if maker is not None and self._lives[maker.worker] == maker else (None, None)

    def _intact(self, assignment: Assignment) -> bool:
        """Whether all that the group needs is, or will be, in the memory of workers that live."""
        needed = (assignment.life, assignment.maker)
        return all(self._lives[life.worker] == life for life in needed if life is not None)

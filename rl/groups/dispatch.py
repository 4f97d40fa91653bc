"""Which worker rolls out which group, and what happens to the groups of a lost worker. Pure: it calls no actor.

A group gets a ticket of the buffer when it is admitted, and an assignment to a worker each time it is sent. When a
worker is lost, so is all that it had in memory: groups under way, and the media of groups that it has finished. Those
that are not trained yet are assigned again, under their old tickets.

Invariants:
* every ticket is fulfilled or dropped exactly once, by its latest assignment; replies to earlier ones are ignored;
* lost groups are assigned before any new one is admitted, in the order of their tickets;
* no worker has more than its limit of groups under way, and none gets a group while it is lost or lags too far behind;
* groups that a checkpoint has kept get a ticket in their turn, and go to no worker unless they are lost;
* a group that may have ended a worker has one to itself (`runtime.recovery.suspects`);
* with `deterministic` group number n belongs to worker n mod W, which has one group at a time, also after a loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from conf.schema import RunConfig
from rl.groups.buffer import GroupBuffer
from rl.results import ReadyGroup
from rl.versions import VersionLedger
from runtime.recovery.suspects import Suspects
from runtime.task_order import group_id
from streams.messages import GroupSummary, RolloutTask
from streams.support.byte_cache import ByteBudgetCache
from streams.task import Plan, StreamTask


@dataclass(frozen=True)
class Life:
    """One process of a worker. Its objects in the object store are lost with it. number: how many were lost before."""

    worker: int
    number: int


KEPT = Life(-1, 0)
"""Stands for the worker of a group that a checkpoint has kept: no loss of a worker takes it away."""


@dataclass(frozen=True)
class Assignment:
    """A group as it is sent to a worker, once, or taken from a checkpoint.

    Attributes:
        ticket: the group's place in the buffer.
        epoch, task: the group's identity.
        plan: how many turns, and how long a chunk.
        life: the process of the worker it is sent to, or KEPT.
        features: a reference to the encoded clip, sent along; None if the worker is to encode it.
        maker: the process that made `features`; None without features.
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


class _Coming:
    """The groups still to come, in order. kept: names of those that a checkpoint has."""

    def __init__(self, source: Iterator[tuple[int, StreamTask]], kept: Collection[str]) -> None:
        self._source, self._kept = source, set(kept)
        self._ahead: tuple[int, StreamTask] | None = None

    def take(self) -> tuple[int, StreamTask]:
        """Return the next group's epoch and task."""
        taken = self._ahead or next(self._source)
        self._ahead = None
        return taken

    def take_kept(self) -> tuple[int, StreamTask] | None:
        """Return the next group if it is kept, once; else None, and it stays the next."""
        epoch, task = self._ahead = self._ahead or next(self._source)
        if (name := group_id(epoch, task)) not in self._kept:
            return None
        self._kept.remove(name)
        return self.take()


class Dispatcher:
    """Assigns groups to workers, with tickets of `buffer`. The loop sends what `next` returns and reports the outcome."""

    def __init__(
        self,
        config: RunConfig,
        buffer: GroupBuffer[ReadyGroup],
        ledger: VersionLedger,
        source: Iterator[tuple[int, StreamTask]],
        done: int = 0,
        suspects: Suspects | None = None,
        kept: Collection[str] = (),
    ) -> None:
        """source: (epoch, task) of the groups still to come. done: number of groups trained or dropped before.

        suspects: told of everything that is sent to a worker. kept: names of groups that a checkpoint has.
        """
        self._config, self._buffer, self._ledger, self._coming = config, buffer, ledger, _Coming(source, kept)
        self._suspects = suspects or Suspects()
        self._done_before = done
        self._limit = 1 if config.deterministic else max(1, config.rollout.max_streams // config.algorithm.group_size)
        self._load = [0] * ledger.workers
        self._lives = [Life(worker, 0) for worker in range(ledger.workers)]
        self._lost: set[int] = set()
        self._latest: dict[int, Assignment] = {}
        self._returned: dict[int, Assignment] = {}
        self._bare: set[int] = set()  # tickets whose groups are given no features
        # A reference keeps its features alive in the object store: the budget limits how much a long dataset pins
        # there.
        self._features: ByteBudgetCache[tuple[Any, Life]] = ByteBudgetCache(config.data.cache_mb * 2**20)
        self.clips: set[str] = set()

    # --- out ------------------------------------------------------------------------------------------------------

    def next(self, version: int, left: int) -> Assignment | None:
        """Return the next assignment; None while no worker may take it, the buffer is full, or no more groups are
        needed.

        version: the learner's version. left: number of groups that the stage has still to train, those under way
        included. One whose life is KEPT is not sent to a worker.
        """
        if self._returned:
            ticket = min(self._returned)
            worker = self._worker_for(ticket, version, self._returned[ticket].group)
            if worker is None:
                return None
            lost = self._returned.pop(ticket)
            return self._assign(ticket, lost.epoch, lost.task, lost.plan, worker)
        if not self._buffer.may_admit() or self._buffer.untrained >= left:
            return None
        if (found := self._coming.take_kept()) is not None:
            kept = Assignment(self._buffer.admit(), *found, self._config.data.plan_of(found[1]), KEPT)
            self._latest[kept.ticket] = kept
            return kept
        worker = self._worker_for(self._buffer.admitted, version, "")
        if worker is None:
            return None
        epoch, task = self._coming.take()
        return self._assign(self._buffer.admit(), epoch, task, self._config.data.plan_of(task), worker)

    def request(self, assignment: Assignment) -> RolloutTask:
        """Return the message that asks a worker for the assignment's group."""
        return _rollout_task(self._config, assignment.group, assignment.task, assignment.plan, assignment.features)

    def extra(self, name: str) -> RolloutTask:
        """Return a request for one more group of the source, under a name of its own, which is not trained on."""
        _, task = self._coming.take()
        return _rollout_task(
            self._config, f"{name}/{task.id}", task, self._config.data.plan_of(task), self._kept(task)[0]
        )

    # --- back -----------------------------------------------------------------------------------------------------

    def returned(self, assignment: Assignment, summary: GroupSummary) -> bool:
        """Note a worker's reply. Returns False if it must be ignored, since the group was assigned again meanwhile."""
        # A worker that was lost since then has had its load set to 0.
        if self._lives[assignment.worker] == assignment.life:
            self._load[assignment.worker] -= 1
        if not self.is_latest(assignment):
            return False
        if summary.features is not None:
            # A worker that was given features returns the same reference, so they still live and die with their maker.
            kept = (summary.features, assignment.maker or assignment.life)
            self._features.put(assignment.task.id, kept, summary.feature_bytes)
        return True

    def is_latest(self, assignment: Assignment) -> bool:
        """Return whether the outcome of this assignment counts: its group was not taken back, and is not over."""
        return self._latest.get(assignment.ticket) is assignment

    def fulfil(self, assignment: Assignment, group: ReadyGroup) -> None:
        """Make the group ready for training. The assignment must be its latest."""
        assert self.is_latest(assignment), f"group {assignment.group} was assigned again"
        self._buffer.fulfil(assignment.ticket, group)

    def drop(self, assignment: Assignment) -> None:
        """Give up the group's place in the buffer. The assignment must be its latest."""
        assert self.is_latest(assignment), f"group {assignment.group} was assigned again"
        self._buffer.drop(assignment.ticket)
        del self._latest[assignment.ticket]

    # --- lost workers ---------------------------------------------------------------------------------------------

    def reissue(self, worker: int) -> tuple[int, ...]:
        """Take back all untrained groups that need the lost `worker`, and give it none until it is `restored`.

        Returns their tickets; `next` assigns them again. A group in training stays: if the learner cannot fetch its payload,
        that step fails, and `reissue_batch` takes it back.
        """
        self._ledger.lose(worker)
        self._lives[worker] = Life(worker, self._lives[worker].number + 1)
        self._load[worker] = 0
        self._lost.add(worker)
        taken = {
            ticket: assignment
            for ticket, assignment in self._latest.items()
            if self._buffer.waits(ticket)
            and any(
                life not in (None, KEPT) and self._lives[life.worker] != life
                for life in (assignment.life, assignment.maker)
            )
        }
        for ticket in taken:
            self._buffer.reopen(ticket)
            del self._latest[ticket]
        self._returned |= taken
        return tuple(sorted(taken))

    def reissue_batch(self) -> tuple[int, ...]:
        """Take back the groups of a batch that could not be trained, as media were lost. Returns their tickets."""
        tickets = self._buffer.take_back()
        for ticket in tickets:
            self.again(self._latest[ticket])
        return tuple(tickets)

    def again(self, assignment: Assignment) -> None:
        """Have a group rolled out again, without the features that it was given: whoever made them may have died unseen."""
        self._features.forget(assignment.task.id)
        self._bare.add(assignment.ticket)
        self._returned[assignment.ticket] = self._latest.pop(assignment.ticket)

    def restored(self, worker: int, version: int) -> None:
        """Give groups again to a worker that was lost, and now runs this version."""
        self._ledger.restore(worker, version)
        self._lost.remove(worker)

    # --- which worker ---------------------------------------------------------------------------------------------

    def _worker_for(self, ticket: int, version: int, group: str) -> int | None:
        """Return the worker for a ticket; None if none may take a group now. group: its name; "" for one not sent before.

        It is the worker that owns the group's number if runs are deterministic, else the one with the fewest groups.
        """
        workers = range(len(self._load))
        if self._config.deterministic:
            own = (self._done_before + ticket) % len(workers)
            workers = range(own, own + 1)
        free = [
            w
            for w in workers
            if self._load[w] < self._limit
            and w not in self._lost
            and self._ledger.may_work(w, version)
            and self._suspects.may_take(w, group)
        ]
        return min(free, key=lambda w: self._load[w], default=None)

    def _assign(self, ticket: int, epoch: int, task: StreamTask, plan: Plan, worker: int) -> Assignment:
        kept = (None, None) if ticket in self._bare else self._kept(task)
        assignment = Assignment(ticket, epoch, task, plan, self._lives[worker], *kept)
        # Nobody reports that a group was trained: forget the assignments whose groups are.
        self._latest = {t: a for t, a in self._latest.items() if self._buffer.holds(t)} | {ticket: assignment}
        self._load[worker] += 1
        self.clips.add(task.id)
        return assignment

    def _kept(self, task: StreamTask) -> tuple[Any, Life | None]:
        """Return (features, their maker) of the task's clip; (None, None) if no living process has made them."""
        features, maker = self._features.get(task.id) or (None, None)
        return (features, maker) if maker is not None and self._lives[maker.worker] == maker else (None, None)


def _rollout_task(config: RunConfig, group: str, task: StreamTask, plan: Plan, features: Any) -> RolloutTask:
    return RolloutTask(
        group=group,
        task=task,
        plan=plan,
        streams=config.algorithm.group_size,
        temperature=config.rollout.temperature,
        features=features,
    )

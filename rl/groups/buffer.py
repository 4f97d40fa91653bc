"""The sample buffer: which groups are admitted, which are ready, how old a sample may be. Pure: no Ray, no tensors.

Invariants:
* groups are trained in the order of their admission, each at most once;
* a group's ticket is its place in that order, whichever worker rolls the group out, and however often.

Proof of the age bound. Groups are numbered in admission order and trained in that order, B per step. Let a group be
admitted when the learner is at version v. At most C groups are admitted and not yet trained, this one included, so at
most C - 1 come before it, and it is trained after at most floor((C - 1) / B) further full steps. The learner is then at
v + floor((C - 1) / B) at most. The worker that got the group was at most `lag` versions behind, so the group's oldest
token has version >= v - lag. Hence age <= floor((C - 1) / B) + lag.

Dropped groups only shorten the queue. A group that is rolled out again keeps its place, so it is trained no later. Its
new worker was at most `lag` behind at some v' >= v, so its oldest token has version >= v' - lag >= v - lag: the bound
is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from conf.age import AgeBound

G = TypeVar("G")


@dataclass
class GroupBuffer(Generic[G]):
    """Groups between admission and training. `admit` -> `fulfil` or `drop` -> `next_batch` -> `trained` or `take_back`.

    Attributes:
        limits: The capacity C, the batch size B, the lag, and the bound on age that follows from them.
    """

    limits: AgeBound
    _next: int = 0
    _waiting: dict[int, G | None] = field(default_factory=dict)
    _in_training: list[int] = field(default_factory=list)  # tickets

    @property
    def admitted(self) -> int:
        """Number of tickets given out so far, which is also the next ticket."""
        return self._next

    @property
    def untrained(self) -> int:
        """Number of groups that are admitted and not yet trained."""
        return len(self._waiting) + len(self._in_training)

    @property
    def ready(self) -> int:
        """Number of groups that wait for a batch, scored."""
        return sum(value is not None for value in self._waiting.values())

    @property
    def finished(self) -> list[G]:
        """The groups that wait for a batch, scored, in the order of their admission."""
        return [value for _, value in sorted(self._waiting.items()) if value is not None]

    def may_admit(self) -> bool:
        """Return whether there is room for one more group."""
        return self.untrained < self.limits.capacity

    def admit(self) -> int:
        """Return the ticket of a new group. Raises RuntimeError beyond the capacity, where the bound would not hold."""
        if not self.may_admit():
            raise RuntimeError(f"{self.untrained} groups are admitted and untrained; the capacity is the age bound")
        self._next += 1
        self._waiting[self._next - 1] = None
        return self._next - 1

    def waits(self, ticket: int) -> bool:
        """Return whether the group of `ticket` has been neither dropped nor cut into a batch."""
        return ticket in self._waiting

    def holds(self, ticket: int) -> bool:
        """Return whether the group of `ticket` has been neither dropped nor trained."""
        return ticket in self._waiting or ticket in self._in_training

    def fulfil(self, ticket: int, group: G) -> None:
        """Make the scored group of a ticket ready for a batch."""
        assert self._waiting[ticket] is None, f"ticket {ticket} was fulfilled twice"
        self._waiting[ticket] = group

    def reopen(self, ticket: int) -> None:
        """Forget the group of a waiting ticket, if it is there already: it is going to be rolled out again."""
        assert self.waits(ticket), f"ticket {ticket} is not waiting: it was dropped or trained"
        self._waiting[ticket] = None

    def drop(self, ticket: int) -> None:
        """Give up the place of a ticket."""
        del self._waiting[ticket]

    def next_batch(self) -> list[G] | None:
        """Return the B oldest groups if all are ready, else None: a later group never overtakes an earlier one."""
        assert not self._in_training, "one batch is trained at a time"
        oldest = sorted(self._waiting)[: self.limits.batch]
        groups = [group for group in (self._waiting[t] for t in oldest) if group is not None]
        if len(oldest) < self.limits.batch or len(groups) < len(oldest):
            return None
        for ticket in oldest:
            del self._waiting[ticket]
        self._in_training = oldest
        return groups

    def take_back(self) -> list[int]:
        """Undo `next_batch`, as the step was not made: its groups are to be rolled out again. Returns their tickets."""
        tickets, self._in_training = self._in_training, []
        self._waiting.update(dict.fromkeys(tickets))
        return tickets

    def trained(self) -> None:
        """Note that the step over the last batch is over."""
        self._in_training = []

    def check_age(self, learner_version: int, oldest_version: int, group: str) -> int:
        """Return the age of a group when it is trained. Raises RuntimeError if it is above the bound proved above."""
        age = learner_version - oldest_version
        if age > self.limits.bound:
            raise RuntimeError(f"group {group} has age {age}, above the bound {self.limits.bound}")
        return age

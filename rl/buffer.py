"""The sample buffer: who is admitted, who is ready, how old a sample may be. Pure bookkeeping, no Ray, no tensors.

Invariants:
* groups are trained in the order of their admission, each at most once;
* a group's ticket is its place in that order, whoever rolls the group out, and however often.

Proof of the bound. Groups are numbered in admission order and trained in that order, B per step. Let a group
be admitted when the learner stands at version v. At most C groups are admitted and not yet trained, this one included,
so at most C - 1 stand before it, and it is trained after at most floor((C - 1) / B) further full steps: the learner
then stands at most at v + floor((C - 1) / B). The worker that got it was at most `lag` versions behind, so its oldest
token has version >= v - lag. Hence age <= floor((C - 1) / B) + lag. Dropped groups only shorten the queue. A group that
is rolled out again keeps its place, so it is trained no later; its worker was at most `lag` behind at some v' >= v, so
its oldest token has version >= v' - lag >= v - lag: the same bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from conf.age import AgeBound

G = TypeVar("G")


@dataclass
class GroupBuffer(Generic[G]):
    """Groups between admission and training. `admit` -> `fulfil` or `drop` -> `next_batch` -> `trained`."""

    limits: AgeBound
    _next: int = 0
    _waiting: dict[int, G | None] = field(default_factory=dict)
    _in_training: int = 0

    @property
    def admitted(self) -> int:
        """Tickets given out so far; the next one's number."""
        return self._next

    @property
    def untrained(self) -> int:
        return len(self._waiting) + self._in_training

    @property
    def ready(self) -> int:
        return sum(value is not None for value in self._waiting.values())

    def may_admit(self) -> bool:
        return self.untrained < self.limits.capacity

    def admit(self) -> int:
        """A place in the queue; raises RuntimeError beyond the capacity (the bound would not hold)."""
        if not self.may_admit():
            raise RuntimeError(f"{self.untrained} groups are admitted and untrained; the capacity is the age bound")
        self._next += 1
        self._waiting[self._next - 1] = None
        return self._next - 1

    def waits(self, ticket: int) -> bool:
        """Whether the group of `ticket` is neither dropped nor cut into a batch."""
        return ticket in self._waiting

    def fulfil(self, ticket: int, group: G) -> None:
        assert self._waiting[ticket] is None, f"ticket {ticket} was fulfilled twice"
        self._waiting[ticket] = group

    def reopen(self, ticket: int) -> None:
        """Forget what fulfilled a waiting ticket, if anything has: its group is to be rolled out again."""
        assert self.waits(ticket), f"ticket {ticket} waits for nothing"
        self._waiting[ticket] = None

    def drop(self, ticket: int) -> None:
        del self._waiting[ticket]

    def next_batch(self) -> list[G] | None:
        """The B oldest groups if all are ready, else None: a later group never overtakes an earlier one."""
        assert not self._in_training, "one batch is trained at a time"
        oldest = sorted(self._waiting)[: self.limits.batch]
        groups = [group for group in (self._waiting[t] for t in oldest) if group is not None]
        if len(oldest) < self.limits.batch or len(groups) < len(oldest):
            return None
        for ticket in oldest:
            del self._waiting[ticket]
        self._in_training = len(groups)
        return groups

    def trained(self) -> None:
        self._in_training = 0

    def check_age(self, learner_version: int, oldest_version: int, group: str) -> int:
        """Age of a group at use; raises RuntimeError if the proof above were wrong."""
        age = learner_version - oldest_version
        if age > self.limits.bound:
            raise RuntimeError(f"group {group} has age {age}, above the bound {self.limits.bound}")
        return age

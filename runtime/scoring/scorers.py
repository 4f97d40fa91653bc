"""The scorers of a session: they are asked for rewards, and replaced when they die, or when they have to be ended.

A scorer interrupts a reward itself where it can, and ends where it cannot (`rewards.deadline`). The driver's limit is for
those that can do neither: a process that is stopped, or that waits for a disk that is gone.

Invariants:
* there is one process for each scorer at any time;
* a call has `reward.timeout_s` + GRACE_S for every term of every stream in it, and SLACK_S; whoever has not replied by then is
  ended, which is a death like any other. It holds as many streams as can take `cluster.call_timeout_s`, at least one;
* a call that follows a death is sent to a process that has just answered: if that one dies, it dies of the call;
* one for which no node has room gets no call while another one has; if none has, room is waited for, `cluster.wait_s` long;
* a scorer that dies MOST_DEATHS times in a row without having answered ends the run, with what it died of first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray

from conf.platform import ClusterConfig
from rewards.compose import Reward, RewardConfig, RewardResult
from rewards.deadline import GRACE_S
from rewards.outcome import StreamOutcome
from runtime.cluster.events import ActorDeath, InVain, first_line
from runtime.placing.room import RoomWatch
from runtime.scoring.desk import Call, Desk, GivenUp, Results
from streams.messages import RewardJob

log = logging.getLogger("sightline.cluster")

START_KEY = "cluster.start_timeout_s"
SLACK_S = 30.0
"""What a call may take beside its terms: a busy machine, a large message."""
MOST_STREAMS = 32
"""Of a call. More would save little: a reply costs the driver about a millisecond."""


class Expect(Protocol):
    """`Events.expect`."""

    def __call__(
        self,
        reference: Any,
        what: str,
        handle: Callable[[Any], None],
        *,
        lost: Callable[[], None],
        own_limit: bool,
    ) -> None: ...


@dataclass(frozen=True)
class _Due:
    """When the process is ended that has not replied. key: where the limit comes from."""

    actor: Any
    at: float
    limit_s: float
    key: str


class Scorers:
    """Attributes: names: short names, by place. actors: the processes as they are now. given_up: see there.

    absent: places for which no node has room, as far as is known. awaited: places that somebody else waits for.
    """

    def __init__(
        self,
        reward: RewardConfig,
        cluster: ClusterConfig,
        names: Sequence[str],
        make: Callable[[int], Any],
        room: RoomWatch | None = None,
        seats: Sequence[int] = (),
    ) -> None:
        """make: starts the process of a place. room, seats: which seats have room, and the seat of each place."""
        self._cluster, self._make = cluster, make
        self._room, self._seats = room, seats
        self.absent: frozenset[int] = frozenset()
        self.awaited: tuple[int, ...] = ()
        self._absent_since = 0.0
        self.names = list(names)
        self.actors = [make(place) for place in range(len(self.names))]
        self.given_up = GivenUp()
        self._stream_s = len(reward.terms) * (reward.timeout_s + GRACE_S)
        self._reward = Reward.without_own_terms(reward)
        self._in_vain = InVain()
        self._causes = [""] * len(self.names)
        self._due: dict[int, _Due] = {}

    @property
    def per_call(self) -> int:
        """The streams of a call, at most."""
        return max(1, min(MOST_STREAMS, int((self._cluster.call_timeout_s - SLACK_S) / self._stream_s)))

    def died(self, name: str, words: str, death: ActorDeath) -> None:
        """Start another process in the place of one that died of what `words` say. Raises RuntimeError, see above."""
        place = self.names.index(name)
        if place not in self.absent:
            self._in_vain.died(name, words, death)
        self._causes[place] = words
        self.replace(place)

    def replace(self, place: int) -> None:
        """Start another process in a place, after the one that is there was ended."""
        self._due.pop(place, None)
        ray.kill(self.actors[place])
        self.actors[place] = self._make(place)

    def cause(self, place: int) -> str:
        """Return what the last process of a place has died of, in one line."""
        return first_line(self._causes[place])

    def failed(self, job: RewardJob, cause: str) -> RewardResult:
        """Return the result of a job of one stream whose reward cannot be computed, and say why."""
        log.warning("%s. It counts as failed", cause)
        return self._reward.failed(StreamOutcome(job.task, job.turns[0], job.plan.chunk_seconds), cause)

    def alive(self, place: int) -> None:
        """Note that a scorer has replied."""
        self._due.pop(place, None)
        self._in_vain.alive(self.names[place])

    def with_room(self) -> list[int]:
        """Ask Ray which places have room; returns them."""
        if self._room is not None:
            self._room.ask(self._seats)
            self._note(range(len(self.names)))
        return [place for place in range(len(self.names)) if place not in self.absent]

    def forget(self) -> None:
        """Note that nobody waits for any reply any more."""
        self._due.clear()

    def may_start(self, place: int) -> None:
        """Limit the time until a process answers: it may have to start."""
        self._limit(place, self._cluster.start_timeout_s, START_KEY)

    def may_score(self, place: int, streams: int) -> None:
        """Limit the time of a call."""
        self._limit(place, streams * self._stream_s + SLACK_S, "reward.timeout_s")

    def look(self) -> None:
        """End the processes that have not replied in time. Waits for nothing.

        Raises TimeoutError if no node has had room for any scorer for too long.
        """
        self._look_for_room()
        for place, due in list(self._due.items()):
            if time.monotonic() > due.at:
                del self._due[place]
                log.warning("%s has not replied for %.0f s (%s): it is ended", self.names[place], due.limit_s, due.key)
                ray.kill(due.actor)

    def _look_for_room(self) -> None:
        """Take calls from processes that cannot start, as long as another one can."""
        starting = [place for place, due in self._due.items() if due.key == START_KEY]
        looked_at = {*starting, *self.absent, *self.awaited}
        if self._room is None or not looked_at:
            return
        self._room.look([self._seats[place] for place in looked_at])
        self._note(looked_at)
        if len(self.absent) == len(self.names):
            now = time.monotonic()
            self._absent_since = self._absent_since or now
            for place in starting:
                self.may_start(place)
            if now - self._absent_since > self._cluster.wait_s:
                raise TimeoutError(
                    f"waited {self._cluster.wait_s:g} s (cluster.wait_s) for a node with room for a scorer: bring a node, or "
                    "lower cluster.actor_cpus"
                )
            return
        self._absent_since = 0.0
        for place in self.absent.intersection(starting):
            del self._due[place]
            ray.kill(self.actors[place])  # what waits for it goes to another one

    def _note(self, looked_at: Collection[int]) -> None:
        """Note which of these have no room, as far as is known."""
        assert self._room is not None
        before = self.absent
        self.absent = frozenset(place for place in looked_at if self._seats[place] in self._room.without)
        for place in self.absent - before:
            log.warning("no node has room for %s: it starts when one has", self.names[place])

    def _limit(self, place: int, seconds: float, key: str) -> None:
        self._due[place] = _Due(self.actors[place], time.monotonic() + seconds, seconds, key)


class Scoring:
    """Has rewards computed by the scorers, for whoever waits with `expect`, which tells `Scorers` of deaths as well."""

    def __init__(self, scorers: Scorers, expect: Expect) -> None:
        self._scorers, self._expect = scorers, expect
        self._desk = Desk(len(scorers.names), scorers.per_call, scorers.failed, scorers.given_up)
        self._answered: list[Any] = [None] * len(scorers.names)  # processes that have answered since then
        scorers.forget()

    def score(self, jobs: Sequence[RewardJob], what: str, handle: Callable[[Results], None]) -> None:
        """Call `handle` with, for each job, one result per stream. what: whose scores they are."""
        self._desk.ask(jobs, what, handle)
        self._send()

    def _send(self) -> None:
        while (call := self._desk.next(self._scorers.absent)) is not None:
            actor = self._scorers.actors[call.place]
            if not call.alone and self._answered[call.place] is actor:
                self._score(call, actor)
                continue
            self._scorers.may_start(call.place)
            self._expect(
                actor.pid.remote(),
                f"{self._scorers.names[call.place]} to start",
                partial(self._started, call, actor),
                lost=partial(self._lost, call, begun=False),
                own_limit=True,
            )

    def _started(self, call: Call, actor: Any, pid: int) -> None:
        self._scorers.alive(call.place)
        self._answered[call.place] = actor
        self._score(call, actor)

    def _score(self, call: Call, actor: Any) -> None:
        self._scorers.may_score(call.place, len(call.streams))
        self._expect(
            actor.score.remote(call.jobs),
            f"the scores of {call.what}",
            partial(self._scored, call),
            lost=partial(self._lost, call, begun=True),
            own_limit=True,
        )

    def _scored(self, call: Call, results: Sequence[tuple[RewardResult, ...]]) -> None:
        self._scorers.alive(call.place)
        self._desk.answered(call, [result for (result,) in results])
        self._send()

    def _lost(self, call: Call, *, begun: bool) -> None:
        self._desk.lost(call, self._scorers.cause(call.place), begun=begun)
        self._send()

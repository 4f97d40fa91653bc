"""Signs of life: an actor that hangs is ended, so that it is replaced like one that died.

Invariants:
* a worker, or a rank of the learner, that gives no sign of life for `cluster.hang_s` is ended: what it leaves without a reply
  comes as its death;
* so is a scorer whose reply is overdue: it computes in the one thread that could give a sign (`runtime.scoring.scorers`);
* looking for signs of life waits for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError

from streams.messages import WorkerStats

log = logging.getLogger("sightline.cluster")


BEAT_S = 2.0
"""How often an actor is asked, at most."""


class Calls(Protocol):
    """Calls that are waited for."""

    def look(self) -> None:
        """End whoever has not replied in time."""


class Workers(Protocol):
    """workers: the actors as they are now. waiting: those that cannot start, as no node has room for them."""

    workers: list[Any]

    @property
    def waiting(self) -> set[int]: ...


class Ranks(Protocol):
    """actors: the learner's ranks as they are now."""

    actors: list[Any]


@dataclass
class _Asked:
    """limit_s: how long its reply may take. reply: None until it is asked."""

    actor: Any
    at: float
    limit_s: float
    reply: Any = None


class Watch:
    """Looks after the rollout workers, and the learner's ranks. hang_s: seconds without a sign of life.

    start_s: seconds until a process gives its first. where: has all actors say where they stand, before one is ended.
    """

    def __init__(
        self,
        workers: Workers,
        scorers: Calls,
        hang_s: float,
        start_s: float,
        learners: Ranks | None = None,
        where: Callable[[], str] | None = None,
    ) -> None:
        self._workers, self._scorers, self._learners = workers, scorers, learners
        self._hang_s, self._start_s = hang_s, max(start_s, hang_s)
        self._where = where
        self._asked: dict[str, _Asked] = {}
        self._ended: set[str] = set()

    def look(self) -> None:
        """Ask everyone for a sign of life, now and then, and end those that gave none, or no reply in time."""
        self._scorers.look()
        for worker, actor in enumerate(self._workers.workers):
            if worker in self._workers.waiting:
                self._asked.pop(f"rollout-{worker}", None)
            else:
                self._look_at(f"rollout-{worker}", actor, actor.stats)
        ranks = [] if self._learners is None else self._learners.actors
        for rank, actor in enumerate(ranks):
            self._look_at("learner" if len(ranks) == 1 else f"learner-{rank}", actor, actor.beat)

    def _look_at(self, name: str, actor: Any, sign: Any) -> None:
        now = time.monotonic()
        asked = self._asked.get(name)
        if asked is None or asked.actor is not actor:
            # Whoever starts imports for a while before it answers anything.
            self._asked[name] = _Asked(actor, now, self._start_s)
        elif asked.reply is None:
            if now - asked.at >= BEAT_S:
                self._asked[name] = _Asked(actor, now, asked.limit_s, sign.remote())
        else:
            self._read(name, asked, now)

    def _read(self, name: str, asked: _Asked, now: float) -> None:
        done, _ = ray.wait([asked.reply], timeout=0)
        if not done:
            if now - asked.at > asked.limit_s:
                self._end(name, asked.actor, f"has not answered for {now - asked.at:.0f} s")
            return
        self._asked[name] = _Asked(asked.actor, now, self._hang_s)
        try:
            stats: WorkerStats | None = ray.get(done[0], timeout=BEAT_S)
        except (RayActorError, OutOfMemoryError):
            return  # it died: its calls say so
        except GetTimeoutError:
            return  # it has answered, and is asked again
        if stats is not None and stats.visit_s > self._hang_s:
            self._end(name, asked.actor, f"has been in one visit of its engine for {stats.visit_s:.0f} s")

    def _end(self, name: str, actor: Any, why: str) -> None:
        key = actor._actor_id.hex()
        if key in self._ended:
            return
        self._ended.add(key)
        log.warning("%s %s (cluster.hang_s=%g): it is ended", name, why, self._hang_s)
        if self._where is None:
            ray.kill(actor)
        else:
            threading.Thread(target=_end_after, args=(self._where, actor), name="watch", daemon=True).start()


def _end_after(where: Callable[[], str], actor: Any) -> None:
    """End an actor once it is known where all of them stand; that takes seconds."""
    try:
        log.warning("%s", where())
    finally:
        ray.kill(actor)

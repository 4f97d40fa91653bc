"""Rollout workers and scorers that die or hang while a stage runs: another process takes their place.

Neither has anything that cannot be made again: a worker loads the stage's checkpoint and fetches the newest weights, and what
it had under way is asked for again by those who asked before. A learner's death ends the run.

Invariants:
* a process is replaced once, however many calls it leaves without a reply, and ended before it is;
* one that dies MOST_DEATHS times in a row before it has done anything ends the run, with the cause of the first time;
* a worker that gives no sign of life for `cluster.hang_s` is ended: what it leaves without a reply comes as its death;
* looking for signs of life waits for nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from rollout.setup import WorkerInfo, WorkerSetup
from runtime.cluster.crew import Crew
from runtime.cluster.events import MOST_DEATHS, ActorDeath
from runtime.cluster.session import Session
from streams.messages import WorkerStats

SCORER = "scorer"
log = logging.getLogger("sightline.cluster")
BEAT_S = 2.0
"""How often a worker is asked, at most."""


def deaths_in_words(deaths: dict[str, int]) -> str:
    """Return what to add to a stage's last line; empty if nobody died."""
    if not deaths:
        return ""
    named = ", ".join(f"{name} {count}" for name, count in sorted(deaths.items()))
    return f"; {sum(deaths.values())} processes died and were replaced ({named})"


class Revival:
    """The actors of one stage that may come and go.

    Attributes:
        deaths: how many processes were replaced, by the actor's short name.
        loading: workers whose new process is not ready yet.
    """

    def __init__(
        self,
        session: Session,
        expect: Callable[..., None],
        say: Callable[[str], None],
        newest: Callable[[WorkerSetup], WorkerSetup],
    ) -> None:
        """expect: `Events.expect` of the stage. say: tells the user, a line each.

        newest: returns the setup with a checkpoint of the stage that is still there.
        """
        self._session, self._expect, self._say, self._newest = session, expect, say, newest
        self._gone: set[str] = set()  # ids of the processes that are known to be dead
        self._useful: set[str] = set()  # actors whose present process has done something
        self._in_vain: dict[str, list[str]] = {}  # what each actor's processes died of that had done nothing
        self._lost: list[Callable[[int], object]] = []
        self._back: list[Callable[[int, int], None]] = []
        self.deaths: dict[str, int] = {}
        self.loading: set[int] = set()

    def watch(self, lost: Callable[[int], object], back: Callable[[int, int], None]) -> None:
        """Have others told: lost(worker) when its process has died, back(worker, version) when another one has loaded."""
        self._lost.append(lost)
        self._back.append(back)

    def alive(self, name: str) -> None:
        """Note that an actor has done something."""
        self._useful.add(name)
        self._in_vain.pop(name, None)

    def died(self, death: ActorDeath) -> None:
        """Replace the process. Raises RuntimeError for an actor that cannot be, and for one that dies over and over."""
        book, error = self._session.book, death.error
        name = book.name_of(error)
        if not name.startswith("rollout-") and name != SCORER:
            raise RuntimeError(f"an actor died during {death.what}: {book.explain(error)}") from error
        if error.actor_id in self._gone:
            return
        self._gone.add(str(error.actor_id))
        self._count(name, death)
        if name == SCORER:
            self._session.crew.replace_scorer()
            return
        worker = int(name.removeprefix("rollout-"))
        self.loading.add(worker)
        for tell in self._lost:
            tell(worker)
        self._session.crew.replace_worker(worker)
        self._load(worker)

    def _load(self, worker: int) -> None:
        crew = self._session.crew
        assert crew.setup is not None, "a stage runs"
        setup = self._newest(crew.setup)
        self._expect(
            crew.workers[worker].setup.remote(setup),
            f"rollout-{worker} to load {setup.checkpoint} in place of one that died",
            lambda info: self._loaded(worker, setup.version, info),
            lambda error: self._failed(worker, setup, error),
        )

    def _failed(self, worker: int, setup: WorkerSetup, error: Exception) -> None:
        if Path(setup.checkpoint).is_dir():
            raise error
        # Newer ones took its place while the worker was about to read it.
        self._load(worker)

    def _loaded(self, worker: int, version: int, info: WorkerInfo) -> None:
        self.loading.discard(worker)
        self._say(f"rollout-{worker} is there again (pid {info.pid}, node {info.node})")
        for tell in self._back:
            tell(worker, version)

    def _count(self, name: str, death: ActorDeath) -> None:
        words = self._session.book.explain(death.error)
        self.deaths[name] = self.deaths.get(name, 0) + 1
        causes = self._in_vain.setdefault(name, [])
        if name not in self._useful:
            causes.append(words)
        self._useful.discard(name)
        if len(causes) >= MOST_DEATHS:
            raise RuntimeError(
                f"{name} died {len(causes)} times in a row before it had done anything, last during {death.what}; the first "
                f"time: {causes[0]}"
            ) from death.error
        self._say(f"{words.splitlines()[0]}; another process takes its place, its work is done again")


@dataclass
class _Asked:
    """limit_s: how long its reply may take. reply: None until it is asked."""

    actor: Any
    at: float
    limit_s: float
    reply: Any = None


class Watch:
    """Looks after the workers of a crew. hang_s: seconds without a sign of life. start_s: until a process gives its first."""

    def __init__(self, crew: Crew, hang_s: float, start_s: float) -> None:
        self._crew, self._hang_s, self._start_s = crew, hang_s, max(start_s, hang_s)
        self._asked: dict[int, _Asked] = {}
        self._ended: set[str] = set()

    def look(self) -> None:
        """Ask every worker for a sign of life, now and then, and end those that gave none."""
        now = time.monotonic()
        for worker, actor in enumerate(self._crew.workers):
            asked = self._asked.get(worker)
            if asked is None or asked.actor is not actor:
                # Whoever starts imports for a while before it answers anything.
                self._asked[worker] = _Asked(actor, now, self._start_s)
            elif asked.reply is None:
                if now - asked.at >= BEAT_S:
                    self._asked[worker] = _Asked(actor, now, asked.limit_s, actor.stats.remote())
            else:
                self._read(worker, asked, now)

    def _read(self, worker: int, asked: _Asked, now: float) -> None:
        done, _ = ray.wait([asked.reply], timeout=0)
        if not done:
            if now - asked.at > asked.limit_s:
                self._end(worker, asked.actor, f"has not answered for {now - asked.at:.0f} s")
            return
        self._asked[worker] = _Asked(asked.actor, now, self._hang_s)
        try:
            stats: WorkerStats | None = ray.get(done[0])
        except RayActorError:
            return  # it died: its calls say so
        if stats is not None and stats.visit_s > self._hang_s:
            self._end(worker, asked.actor, f"has been in one visit of its engine for {stats.visit_s:.0f} s")

    def _end(self, worker: int, actor: Any, why: str) -> None:
        key = actor._actor_id.hex()
        if key in self._ended:
            return
        self._ended.add(key)
        log.warning("rollout-%d %s (cluster.hang_s=%g): it is ended", worker, why, self._hang_s)
        ray.kill(actor)

"""Rollout workers and scorers that die while a stage runs: another process takes their place. Workers also join late.

Neither has anything that cannot be made again: a worker loads the stage's checkpoint and fetches the newest weights, and what
it had under way is asked for again by those who asked before (a scorer's: `runtime.scoring`). A learner's death ends the
stage's attempt (`runtime.recovery.restarts`).

Invariants:
* a process is replaced once, however many calls it leaves without a reply, and ended before it is;
* one that dies MOST_DEATHS times in a row before it has done anything ends the run, with the cause of the first time;
* a worker that no node has room for is waited for while the others go on; with fewer of them than `rollout.min_workers` no
  longer than `cluster.wait_s`;
* a worker that cannot load is given up for the stage, while there are as many others as are needed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ray

from rollout.setup import WorkerInfo, WorkerSetup
from runtime.cluster.events import ActorDeath, InVain, first_line
from runtime.cluster.session import Session
from runtime.recovery.suspects import Suspects

log = logging.getLogger("sightline.cluster")


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
        suspects: what is under way on the workers, and what of it may have ended one.
        loading: workers whose process is not ready yet, or has not even room to start, with the time since when it has.
    """

    def __init__(
        self,
        session: Session,
        expect: Callable[..., None],
        say: Callable[[str], None],
        newest: Callable[[WorkerSetup], WorkerSetup],
        deaths: Counter[str],
        suspects: Suspects,
    ) -> None:
        """expect: `Events.expect` of the stage, without its limit. say: tells the user, a line each.

        newest: returns the setup with a checkpoint of the stage that is still there. deaths: those until now, by the actor's
        short name. suspects: what is known of work that ends workers.
        """
        self._session, self._expect, self._say, self._newest = session, expect, say, newest
        self._gone: set[str] = set()  # ids of the processes that are known to be dead
        self._in_vain = InVain()
        self._lost: list[Callable[[int], object]] = []
        self._back: list[Callable[[int, int], None]] = []
        self.deaths = deaths
        self.suspects = suspects
        self.loading: dict[int, float] = {}
        self._given_up: set[int] = set()
        self._too_few_since: float | None = None
        self._told: set[int] = set()  # workers whose want of room has been told

    def begin(self) -> None:
        """Have the workers join that are not here yet."""
        places = self._session.crew.places
        for worker in range(len(places.workers)):
            if worker not in places.loaded:
                self._told.add(worker)  # by the session
                self._load(worker)

    def watch(self, lost: Callable[[int], object], back: Callable[[int, int], None]) -> None:
        """Have others told: lost(worker) when its process has died, back(worker, version) when another one has loaded.

        A worker that has not joined yet is lost.
        """
        self._lost.append(lost)
        self._back.append(back)
        for worker in self.loading:
            lost(worker)

    @property
    def coming(self) -> set[int]:
        """Workers that load, or start."""
        return set(self.loading) - self._session.crew.places.waiting

    def expected(self) -> set[int]:
        """Return the workers that are there, or will soon be."""
        return self._session.crew.places.loaded | self.coming

    def look(self) -> None:
        """End a process that loads for too long. Raises TimeoutError if too few workers have had room for too long."""
        if not self.loading and not self._given_up:
            return
        places, config, now = self._session.crew.places, self._session.config.cluster, time.monotonic()
        for worker, since in self.loading.items():
            if worker in places.waiting:
                self.loading[worker] = now
            elif now - since > config.start_timeout_s:
                self.loading[worker] = now
                log.warning(
                    "rollout-%d has been loading for %.0f s (cluster.start_timeout_s=%g): it is ended",
                    worker,
                    now - since,
                    config.start_timeout_s,
                )
                ray.kill(places.workers[worker])
        there = len(places.workers) - len(places.waiting | self._given_up)
        for worker in places.waiting - self._told:
            self._say(f"no node has room for rollout-{worker}: it joins when one has, {there} workers go on")
        self._told = set(places.waiting)
        if there >= places.least:
            self._too_few_since = None
        else:
            self._too_few_since = self._too_few_since or now
            places.check_wait(self._too_few_since, there)

    def alive(self, name: str) -> None:
        """Note that a worker has done something."""
        self._in_vain.alive(name)

    def died(self, death: ActorDeath) -> None:
        """Replace the process. Raises RuntimeError for an actor that cannot be, and for one that dies over and over."""
        book, error, scorers = self._session.book, death.error, self._session.crew.scorers
        name = book.name_of(error)
        if not name.startswith("rollout-") and name not in scorers.names:
            raise RuntimeError(f"an actor died during {death.what}: {book.explain(error)}") from error
        if error.actor_id in self._gone:
            return
        self._gone.add(str(error.actor_id))
        words = book.explain(error)
        self.deaths[name] += 1
        replaced = f"{first_line(words)}; another process takes its place, its work is done again"
        if name in scorers.names:
            scorers.died(name, words, death)
            self._say(replaced)
            return
        worker = int(name.removeprefix("rollout-"))
        if self.suspects.died(worker, book.cause_inside(error)):
            self._in_vain.alive(name)  # the process could not help it
        self._in_vain.died(name, words, death)
        self._say(replaced)
        for tell in self._lost:
            tell(worker)
        self._session.crew.places.replace(worker)
        self._load(worker)

    def _load(self, worker: int) -> None:
        crew = self._session.crew
        self.loading[worker] = time.monotonic()
        assert crew.setup is not None, "a stage runs"
        setup = self._newest(crew.setup)
        self._expect(
            crew.places.workers[worker].setup.remote(setup),
            f"rollout-{worker} to load {setup.checkpoint}",
            lambda info: self._loaded(worker, setup.version, info),
            lambda error: self._failed(worker, setup, error),
        )

    def _failed(self, worker: int, setup: WorkerSetup, error: Exception) -> None:
        if not Path(setup.checkpoint).is_dir():
            # Newer ones took its place while the worker was about to read it.
            self._load(worker)
            return
        places = self._session.crew.places
        if len(places.loaded) < places.least:
            raise error
        # It may be on a node that is not like the others.
        del self.loading[worker]
        self._given_up.add(worker)
        self._say(f"rollout-{worker} could not load and is given up, {len(places.loaded)} workers go on: {error}")

    def _loaded(self, worker: int, version: int, info: WorkerInfo) -> None:
        del self.loading[worker]
        before = self._session.crew.places.arrived(worker, info)
        if before is not None and before.node == info.node and info.oom_kills > before.oom_kills:
            # Nobody but the kernel knows of what it died.
            self.suspects.blame_last(worker, f"node {info.node} ran out of memory")
        again = " again" if self.deaths[f"rollout-{worker}"] else ""
        self._say(f"rollout-{worker} is there{again} (pid {info.pid}, node {info.node})")
        for tell in self._back:
            tell(worker, version)

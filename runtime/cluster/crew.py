"""The rollout workers and the scorers of a session: those that die are replaced, and asked again.

Neither holds anything that cannot be made again. While a training stage runs, its events bring the deaths, and
`runtime.recovery.revival` replaces; here are the calls that are waited for one by one, between stages and in evaluations.

Invariants:
* a worker for which no node has room is waited for only while fewer than `rollout.min_workers` are there, a scorer only
  while no other one has room;
* an actor that dies MOST_DEATHS times in a row without a reply ends the run, with what it died of.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from conf.schema import RunConfig
from rollout.setup import WorkerInfo, WorkerSetup
from runtime.cluster.actors import ActorBook, short_name
from runtime.cluster.events import (
    CALL_LIMIT,
    MOST_DEATHS,
    SLICE_S,
    START_LIMIT,
    ActorDeath,
    ActorLostError,
    Events,
    first_line,
    wait_for,
)
from runtime.cluster.maker import ActorMaker
from runtime.cluster.places import Places
from runtime.placing.placement import scorer_names
from runtime.placing.room import RoomWatch
from runtime.placing.seats import NoRoomError
from runtime.recovery.stacks import ask_everywhere
from runtime.recovery.suspects import Suspects
from runtime.recovery.watch import Watch
from runtime.scoring.desk import Results
from runtime.scoring.scorers import Scorers, Scoring
from runtime.stop import StopSignal
from streams.messages import RewardJob

log = logging.getLogger("sightline.cluster")
Send = Callable[[Any], Any]
"""Calls an actor; returns a reference to its reply."""


class Crew:
    """places: the workers. setup: what the workers load, None before the first stage.

    suspects: what evaluations have found out about streams that end their workers.
    """

    def __init__(self, config: RunConfig, book: ActorBook, maker: ActorMaker) -> None:
        cluster = self.config = config.cluster
        self._book = book
        self.places = Places(config, maker)
        names = [short_name(name) for name in scorer_names(config)]
        seats = [maker.seat_of_scorer(place) for place in range(len(names))]
        self.scorers = Scorers(config.reward, cluster, names, maker.scorer, RoomWatch(maker.seats.has_room), seats)
        self.setup: WorkerSetup | None = None
        self.suspects = Suspects()
        self._watch = Watch(
            self.places,
            self.scorers,
            cluster.hang_s,
            cluster.start_timeout_s,
            where=lambda: ask_everywhere(book.log_folder),
        )

    # --- who is there ---------------------------------------------------------------------------------------------

    def set_up(self, setup: WorkerSetup) -> tuple[WorkerInfo, ...]:
        """Have the workers load a stage's checkpoint, at least as many as are needed; returns what they report."""
        self.setup, places = setup, self.places
        what = f"load {setup.checkpoint}"
        found: dict[int, WorkerInfo] = {}
        while len(found) < places.least:
            new = [worker for worker in self.gather() if worker not in found]
            least = places.least - len(found)
            found |= self.of_workers(lambda worker: worker.setup.remote(setup), what, new, start=True, least=least)
        places.loaded.clear()
        for worker, info in found.items():
            places.arrived(worker, info)
        return tuple(found.values())

    def gather(self) -> dict[int, int]:
        """Wait for the workers that have room, and until they are as many as are needed; returns their pids."""
        began, places = time.monotonic(), self.places
        while True:
            pids = self.of_workers(lambda worker: worker.pid.remote(), "start", places.with_room(), start=True)
            if len(pids) >= places.least:
                return pids
            places.check_wait(began, len(pids))
            time.sleep(SLICE_S)

    def look(self) -> None:
        """See who has room, and end the workers that hang."""
        self.places.look()
        self._watch.look()

    # --- calls ----------------------------------------------------------------------------------------------------

    def of_workers(
        self, send: Send, what: str, workers: Collection[int], *, start: bool = False, least: int | None = None
    ) -> dict[int, Any]:
        """Return the replies of `workers`, who are asked at once; none of one that is lost and has no room any more.

        what: they are to do, for messages. start: it may take as long as loading a model. least: so many must reply; another
        one may fail, and is left out. None: nobody may.
        """
        asked = {worker: send(self.places.workers[worker]) for worker in workers}
        found = {}
        failed: list[RayTaskError] = []
        for worker, reference in asked.items():
            try:
                found[worker] = self._of_worker(worker, send, reference, what, start=start)
            except NoRoomError as error:
                log.warning("%s: the run goes on without rollout worker %d", error, worker)
            except RayTaskError as error:
                # It may be on a node that is not like the others.
                if least is None:
                    raise
                failed.append(error)
                log.warning("rollout worker %d could not %s: %s", worker, what, str(error).strip().splitlines()[-1])
        if failed and len(found) < (least or 0):
            raise failed[0]
        return found

    def of_any_worker(self, send: Send, what: str, *, start: bool = False) -> Any:
        """Return the reply of one worker."""
        while True:
            worker = min(self.places.here or self.gather())
            if found := self.of_workers(send, what, [worker], start=start):
                return found[worker]

    def _of_worker(self, worker: int, send: Send, asked: Any, what: str, *, start: bool) -> Any:
        places = self.places

        def look() -> None:
            self.look()
            places.check_room(worker)

        def again() -> Any:
            return send(places.replace(worker))

        reply = self._ask(asked, again, f"rollout worker {worker} to {what}", start, look)
        places.here.add(worker)
        return reply

    def gather_scorers(self) -> dict[int, int]:
        """Wait for the scorers that have room, at least for one; returns their pids by place."""
        pids: dict[int, int] = {}
        while not pids:
            for place in self.scorers.with_room():
                with contextlib.suppress(NoRoomError):
                    pids[place] = self._start_scorer(place)
            if not pids:
                self.look()  # it has a limit
                time.sleep(SLICE_S)
        return pids

    def _start_scorer(self, place: int) -> int:
        """Return the pid of a scorer once it answers. Raises NoRoomError if its node is lost, and no other one has room."""
        scorers = self.scorers
        what = f"{scorers.names[place]} to start"

        def again() -> Any:
            scorers.replace(place)
            return scorers.actors[place].pid.remote()

        def look() -> None:
            self.look()
            if place in scorers.absent:
                raise NoRoomError(what)

        scorers.awaited = (place,)
        try:
            pid: int = self._ask(scorers.actors[place].pid.remote(), again, what, True, look)
        finally:
            scorers.awaited = ()
        return pid

    def of_living(self, send: Send, what: str) -> list[Any]:
        """Return the workers' replies; None for one that is not there, or has died: what it would say is lost with it."""
        places = self.places
        found: list[Any] = [None] * len(places.workers)
        for worker, reference in {worker: send(places.workers[worker]) for worker in sorted(places.here)}.items():
            try:
                found[worker] = self.wait(reference, f"rollout worker {worker} to {what}")
            except ActorLostError as error:
                log.warning("%s", first_line(error))
        return found

    def score(self, jobs: Sequence[RewardJob], what: str) -> Results:
        """Return the rewards of `jobs`: for each job, one result per stream. what: whose they are."""
        found: list[Results] = []
        events = Events(self.config.call_timeout_s, StopSignal(), self._scorer_died, self.look)
        Scoring(self.scorers, events.expect).score(jobs, what, found.append)
        while not found:
            events.wait()
        return found[0]

    def _scorer_died(self, death: ActorDeath) -> None:
        words = self._book.explain(death.error)
        self.scorers.died(self._book.name_of(death.error), words, death)
        log.warning("%s; another process takes its place, its work is done again", first_line(words))

    def cause_inside(self, error: ActorLostError) -> str | None:
        """Return what a process died of, if what it was doing can be the cause."""
        assert isinstance(error.__cause__, RayActorError)
        return self._book.cause_inside(error.__cause__)

    def _ask(self, reference: Any, again: Callable[[], Any], what: str, start: bool, look: Callable[[], None]) -> Any:
        """Return the reply. again: makes another process, and asks that."""
        hung = False
        for left in reversed(range(MOST_DEATHS)):
            try:
                return self.wait(reference, what, start=start, look=look)
            except (ActorLostError, TimeoutError) as error:
                # One that hangs is ended once: another one that takes as long is only slow, as the message says.
                if not left or (hung and isinstance(error, TimeoutError)):
                    raise
                hung = hung or isinstance(error, TimeoutError)
                log.warning("%s; another process takes its place", first_line(error))
                reference = again()
        raise AssertionError("the last try returns or raises")

    def wait(self, reference: Any, what: str, *, start: bool = False, look: Callable[[], None] | None = None) -> Any:
        """Return what a reference stands for. look: as `wait_for`; that of the crew if not given."""
        seconds = self.config.start_timeout_s if start else self.config.call_timeout_s
        limit = START_LIMIT if start else CALL_LIMIT
        return wait_for(reference, seconds, what, self._book.explain, limit, look or self.look)

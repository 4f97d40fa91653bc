"""The rollout workers and the scorers of a session: those that die are replaced, and asked again.

Neither holds anything that cannot be made again. While a training stage runs, its events bring the deaths, and
`runtime.recovery.revival` replaces; here are the calls that are waited for one by one, between stages and in evaluations.

Invariants:
* there is one process for each place at any time: one that only seems to be dead is ended before another is made;
* an actor that dies MOST_DEATHS times in a row without a reply ends the run, with what it died of.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray

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
from runtime.cluster.placement import scorer_names
from runtime.cluster.watch import Watch
from runtime.scoring.desk import Results
from runtime.scoring.scorers import Scorers, Scoring
from runtime.stop import StopSignal
from streams.messages import RewardJob

log = logging.getLogger("sightline.cluster")
_NO_MORE = object()
Send = Callable[[Any], Any]
"""Calls an actor; returns a reference to its reply."""


class Crew:
    """workers: the actors as they are now. setup: what they have loaded, None before the first stage."""

    def __init__(self, config: RunConfig, book: ActorBook, maker: ActorMaker) -> None:
        cluster = self._config = config.cluster
        self._book, self._maker = book, maker
        self.workers = [maker.worker(i) for i in range(config.rollout.workers)]
        names = [short_name(name) for name in scorer_names(config)]
        self.scorers = Scorers(config.reward, cluster, names, maker.scorer)
        self.setup: WorkerSetup | None = None
        self._watch = Watch(self, cluster.hang_s, cluster.start_timeout_s)

    # --- places ---------------------------------------------------------------------------------------------------

    def replace_worker(self, worker: int) -> Any:
        """Start a process in the place of a rollout worker; returns it. It has loaded nothing."""
        ray.kill(self.workers[worker])
        self.workers[worker] = self._maker.worker(worker)
        return self.workers[worker]

    def set_up(self, setup: WorkerSetup) -> tuple[WorkerInfo, ...]:
        """Have all workers load a stage's checkpoint; returns what they report."""
        self.setup = setup
        return tuple(self.of_workers(lambda worker: worker.setup.remote(setup), f"load {setup.checkpoint}", start=True))

    # --- calls ----------------------------------------------------------------------------------------------------

    def of_workers(self, send: Send, what: str, *, start: bool = False) -> list[Any]:
        """Return the replies of all workers, who are asked at once.

        what: they are to do, for messages. start: it may take as long as loading a model.
        """
        references = [send(worker) for worker in self.workers]
        return [self.of_worker(i, send, what, start=start, asked=reference) for i, reference in enumerate(references)]

    def of_worker(self, worker: int, send: Send, what: str, *, start: bool = False, asked: Any = None) -> Any:
        """Return a worker's reply. asked: the reference, if it was asked already."""
        what = f"rollout worker {worker} to {what}"
        return self._ask(lambda: send(self.workers[worker]), lambda: self.replace_worker(worker), what, start, asked)

    def start_scorer(self, place: int) -> int:
        """Wait until a scorer answers; returns its pid."""
        scorers = self.scorers
        what = f"{scorers.names[place]} to start"
        pid: int = self._ask(
            lambda: scorers.actors[place].pid.remote(), lambda: scorers.replace(place), what, start=True
        )
        return pid

    def of_living(self, send: Send, what: str) -> list[Any]:
        """Return the workers' replies; None for one that has died: what it would say is lost with it."""
        found: list[Any] = []
        for worker, reference in enumerate([send(worker) for worker in self.workers]):
            try:
                found.append(self._wait(reference, f"rollout worker {worker} to {what}"))
            except ActorLostError as error:
                log.warning("%s", first_line(error))
                found.append(None)
        return found

    def score(self, jobs: Sequence[RewardJob], what: str) -> Results:
        """Return the rewards of `jobs`: for each job, one result per stream. what: whose they are."""
        found: list[Results] = []
        events = Events(self._config.call_timeout_s, StopSignal(), self._scorer_died, self._watch.look)
        Scoring(self.scorers, events.expect).score(jobs, what, found.append)
        while not found:
            events.wait()
        return found[0]

    def _scorer_died(self, death: ActorDeath) -> None:
        words = self._book.explain(death.error)
        self.scorers.died(self._book.name_of(death.error), words, death)
        log.warning("%s; another process takes its place, its work is done again", first_line(words))

    def spread(
        self, items: Iterable[Any], send: Callable[[Any, Any], Any], per_worker: int, what: str
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Run `send(worker, item)` over all workers: it returns references, to a reply and to what goes with it.

        Yields (item, reply, references) as they finish, with at most `per_worker` under way on each. What a worker that died
        had under way is sent again. Raises TimeoutError, ActorLostError.
        """
        pending: dict[Any, tuple[Any, Any, int]] = {}
        load, deaths = [0] * len(self.workers), [0] * len(self.workers)
        again: deque[Any] = deque()
        iterator = iter(items)
        while True:
            while min(load) < per_worker:
                item = again.popleft() if again else next(iterator, _NO_MORE)
                if item is _NO_MORE:
                    break
                worker = load.index(min(load))
                references = send(self.workers[worker], item)
                pending[references[0]] = (item, references, worker)
                load[worker] += 1
            if not pending:
                return
            first = self._first(list(pending), what)
            item, references, worker = pending.pop(first)
            load[worker] -= 1
            try:
                reply = self._wait(first, f"{what} on rollout worker {worker}")
            except ActorLostError as error:
                again.append(item)
                if _is_of(error, self.workers[worker]):
                    deaths[worker] += 1
                    self._reload(worker, error, last=deaths[worker] >= MOST_DEATHS)
                continue
            deaths[worker] = 0
            yield item, reply, references

    def _first(self, references: list[Any], what: str) -> Any:
        """Return the first of these that is ready; workers that hang meanwhile are ended. Raises TimeoutError."""
        timeout = self._config.call_timeout_s
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._watch.look()
            done, _ = ray.wait(references, num_returns=1, timeout=min(SLICE_S, left))
            if done:
                return done[0]
        raise TimeoutError(f"waited {timeout:g} s for {what}: {len(references)} calls under way, none finished")

    def _reload(self, worker: int, error: ActorLostError, *, last: bool) -> None:
        """Replace a worker that died, and wait until it has loaded. last: it has died too often; raises the error."""
        if last:
            raise error
        log.warning("%s; another process takes its place, its work is done again", first_line(error))
        self.replace_worker(worker)
        setup = self.setup
        self.of_worker(worker, lambda actor: actor.setup.remote(setup), "load in place of one that died", start=True)

    def _ask(
        self, ask: Callable[[], Any], replace: Callable[[], Any], what: str, start: bool, asked: Any = None
    ) -> Any:
        reference = ask() if asked is None else asked
        hung = False
        for left in reversed(range(MOST_DEATHS)):
            try:
                return self._wait(reference, what, start=start)
            except (ActorLostError, TimeoutError) as error:
                # One that hangs is ended once: another one that takes as long is only slow, as the message says.
                if not left or (hung and isinstance(error, TimeoutError)):
                    raise
                hung = hung or isinstance(error, TimeoutError)
                log.warning("%s; another process takes its place", first_line(error))
                replace()
                reference = ask()
        raise AssertionError("the last try returns or raises")

    def _wait(self, reference: Any, what: str, *, start: bool = False) -> Any:
        seconds = self._config.start_timeout_s if start else self._config.call_timeout_s
        limit = START_LIMIT if start else CALL_LIMIT
        return wait_for(reference, seconds, what, self._book.explain, limit, self._watch.look)


def _is_of(error: ActorLostError, actor: Any) -> bool:
    """Return whether it is this actor that died, and not the one before it."""
    return getattr(error.__cause__, "actor_id", None) == actor._actor_id.hex()

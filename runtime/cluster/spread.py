"""Many items, spread over the rollout workers between stages and in evaluations.

Invariants:
* every item is yielded once, whoever dies meanwhile;
* a worker that dies is replaced, and its items are sent again; where it has no room, the others go on without it;
* an item that ends its workers is given up (`runtime.recovery.suspects`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from runtime.cluster.crew import Crew
from runtime.cluster.events import MOST_DEATHS, SLICE_S, ActorLostError, first_line

log = logging.getLogger("sightline.cluster")


@dataclass(frozen=True)
class _Item:
    """name: tells it apart."""

    name: str
    value: Any


@dataclass(frozen=True)
class _Call:
    item: _Item
    worker: int
    references: Any


def spread(
    crew: Crew,
    items: Iterable[Any],
    send: Callable[[Any, Any], Any],
    per_worker: int,
    what: str,
    name: Callable[[Any], str],
    given_up: Callable[[Any, int, str], Any],
) -> Iterator[tuple[Any, Any, Any]]:
    """Run `send(worker, item)` over all workers: it returns references, to a reply and to what goes with it.

    Yields (item, reply, references) as they finish, with at most `per_worker` under way on each. What a worker that died
    had under way is sent again. name: of an item, as `Suspects` has them. given_up(item, worker, why): returns the reply of
    an item that ends its workers.
    Raises TimeoutError, ActorLostError.
    """
    places, suspects = crew.places, crew.suspects
    suspects.begin()
    pending: dict[Any, _Call] = {}
    load, deaths = [0] * len(places.workers), [0] * len(places.workers)
    again: deque[_Item] = deque()
    fresh = (_Item(name(value), value) for value in items)
    upcoming = next(fresh, None)
    while True:
        while (item := again[0] if again else upcoming) is not None:
            free = [w for w in places.loaded if load[w] < per_worker and suspects.may_take(w, item.name)]
            if not free:
                break
            worker = min(free, key=load.__getitem__)
            if again:
                again.popleft()
            else:
                upcoming = next(fresh, None)
            if (why := suspects.condemned(item.name)) is not None:
                yield item.value, given_up(item.value, worker, why), (None, None)
                continue
            references = send(places.workers[worker], item.value)
            pending[references[0]] = _Call(item, worker, references)
            suspects.sent(worker, item.name)
            load[worker] += 1
        if not pending:
            return
        first = _first(crew, list(pending), what)
        call = pending.pop(first)
        item, worker = call.item, call.worker
        load[worker] -= 1
        try:
            reply = crew.wait(first, f"{what} on rollout worker {worker}")
        except ActorLostError as error:
            if crew.places.is_of(error, worker):
                condemned = suspects.died(worker, crew.cause_inside(error))
                deaths[worker] = 0 if condemned else deaths[worker] + 1
                if deaths[worker] >= MOST_DEATHS:
                    raise
                _reload(crew, worker, error)
            why = suspects.condemned(item.name)
            if why is None:
                again.append(item)
            else:
                yield item.value, given_up(item.value, worker, why), (None, None)
            continue
        deaths[worker] = 0
        suspects.over(worker, item.name)
        yield item.value, reply, call.references


def _first(crew: Crew, references: list[Any], what: str) -> Any:
    """Return the first of these that is ready; workers that hang meanwhile are ended. Raises TimeoutError."""
    timeout = crew.config.call_timeout_s
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        crew.look()
        done, _ = ray.wait(references, num_returns=1, timeout=min(SLICE_S, left))
        if done:
            return done[0]
    raise TimeoutError(f"waited {timeout:g} s for {what}: {len(references)} calls under way, none finished")


def _reload(crew: Crew, worker: int, error: ActorLostError) -> None:
    """Replace a worker that died, and wait until it has loaded; where it has no room, only for as many as are needed."""
    log.warning("%s; another process takes its place, its work is done again", first_line(error))
    places, setup, new = crew.places, crew.setup, {worker}
    places.replace(worker)
    while True:
        what = "load in place of one that died"
        least = max(0, places.least - len(places.loaded))
        loaded = crew.of_workers(lambda actor: actor.setup.remote(setup), what, new, start=True, least=least)
        places.loaded |= set(loaded)
        if len(places.loaded) >= places.least:
            return
        new = set(crew.gather()) - places.loaded

"""The rollout workers of a session as they are now: who is there, who has loaded, and who waits for room.

Invariants:
* there is one process for each place at any time: one that only seems to be dead is ended before another is made;
* a process starts when a node has room for it, at the session's start or later;
* looking waits for nothing, also where Ray's GCS does not answer any more.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from conf.schema import RunConfig
from rollout.setup import WorkerInfo
from runtime.cluster.events import ActorLostError
from runtime.cluster.maker import ActorMaker
from runtime.placing.room import RoomWatch


class Places:
    """One place for each of `rollout.workers`.

    Attributes:
        workers: the actors' handles.
        here: workers whose process has answered. loaded: those that have loaded the stage's checkpoint, too.
        least: how many a run needs.
    """

    def __init__(self, config: RunConfig, maker: ActorMaker) -> None:
        self._maker, self._wait_s = maker, config.cluster.wait_s
        self.workers = [maker.worker(i) for i in range(config.rollout.workers)]
        self.here: set[int] = set()
        self.loaded: set[int] = set()
        self._infos: dict[int, WorkerInfo] = {}
        self.least = config.least_workers
        self._room = RoomWatch(maker.seats.has_room)

    @property
    def waiting(self) -> set[int]:
        """Workers that have not answered yet, and for which no node has room, as far as is known."""
        return {worker for seat, worker in self._absent().items() if seat in self._room.without}

    def replace(self, worker: int) -> Any:
        """Have another process start in a worker's place; returns it. It has loaded nothing."""
        ray.kill(self.workers[worker])
        self.here.discard(worker)
        self.loaded.discard(worker)
        self.workers[worker] = self._maker.worker(worker)
        return self.workers[worker]

    def arrived(self, worker: int, info: WorkerInfo) -> WorkerInfo | None:
        """Note that a worker has loaded the stage's checkpoint; returns what it, or the one before it, said the last time."""
        self.here.add(worker)
        self.loaded.add(worker)
        before = self._infos.get(worker)
        self._infos[worker] = info
        return before

    def is_of(self, error: ActorLostError, worker: int) -> bool:
        """Return whether it is this worker's process that died, and not the one before it."""
        return getattr(error.__cause__, "actor_id", None) == self.workers[worker]._actor_id.hex()

    def look(self) -> None:
        """Have Ray asked, now and then, which of the workers that have not answered yet have no room."""
        self._room.look(self._absent())

    def with_room(self) -> set[int]:
        """Return the workers that are there, or for which a node has room."""
        self._room.ask(self._absent())
        return set(range(len(self.workers))) - self.waiting

    def check_room(self, worker: int) -> None:
        """Raise NoRoomError if a worker is not there, and no node has room for it, as far as `look` knows."""
        if worker in self.waiting:
            self._maker.seats.check(self._maker.seat_of_worker(worker))

    def check_wait(self, since: float, there: int) -> None:
        """Raise TimeoutError if fewer workers than needed were `there` for too long. since: `time.monotonic`."""
        if time.monotonic() - since <= self._wait_s:
            return
        maker = self._maker
        without = [maker.seat_of_worker(w) for w in range(len(self.workers)) if w not in self.here]
        raise TimeoutError(
            f"waited {self._wait_s:g} s (cluster.wait_s) with room for {there} rollout workers, and {self.least} are needed "
            f"(rollout.min_workers; with deterministic=true all): {maker.seats.in_words(without)}"
        )

    def _absent(self) -> dict[int, int]:
        """Return the workers that have not answered yet, by their seats."""
        return {self._maker.seat_of_worker(w): w for w in range(len(self.workers)) if w not in self.here}

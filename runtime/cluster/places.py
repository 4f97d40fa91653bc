"""The rollout workers of a session as they are now: who is there, who has loaded, and who waits for room.

Invariants:
* there is one process for each place at any time: one that only seems to be dead is ended before another is made;
* a process starts when a node has room for it, at the session's start or later;
* looking waits for nothing, also where Ray's GCS does not answer any more.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from conf.schema import RunConfig
from rollout.setup import WorkerInfo
from runtime.cluster.maker import ActorMaker

POLL_S = 2.0
"""How often Ray is asked who has room, at most."""


class Places:
    """One place for each of `rollout.workers`.

    Attributes:
        workers: the actors' handles.
        here: workers whose process has answered. loaded: those that have loaded the stage's checkpoint, too.
        waiting: workers for which no node has room, as far as Ray knows.
        least: how many a run needs.
    """

    def __init__(self, config: RunConfig, maker: ActorMaker) -> None:
        self._maker, self._wait_s = maker, config.cluster.wait_s
        self.workers = [maker.worker(i) for i in range(config.rollout.workers)]
        self.here: set[int] = set()
        self.loaded: set[int] = set()
        self._infos: dict[int, WorkerInfo] = {}
        self.waiting: set[int] = set()
        self.least = config.least_workers
        self._looked = 0.0
        self._asking = threading.Thread(target=self._ask)

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

    def look(self) -> None:
        """Have Ray asked, now and then, which of the workers that have not answered yet have no room."""
        if time.monotonic() - self._looked >= POLL_S and not self._asking.is_alive():
            self._looked = time.monotonic()
            # In a thread: without a GCS the question never ends, and the run has a last checkpoint to write.
            self._asking = threading.Thread(target=self._ask, name="room", daemon=True)
            self._asking.start()

    def with_room(self) -> set[int]:
        """Return the workers that are there, or for which a node has room."""
        self._ask()
        return set(range(len(self.workers))) - self.waiting

    def check_room(self, worker: int) -> None:
        """Raise NoRoomError if a worker is not there, and no node has room for it, as far as `look` knows."""
        if worker in self.waiting and worker not in self.here:
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

    def _ask(self) -> None:
        seats, seat = self._maker.seats, self._maker.seat_of_worker
        absent = [worker for worker in range(len(self.workers)) if worker not in self.here]
        self.waiting = {worker for worker in absent if not seats.has_room(seat(worker))}

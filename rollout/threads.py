"""How work reaches the two threads of a rollout service: the engine thread's inbox and the prepare thread itself.

Invariants:
* nothing here runs a model, reads a clip or settles a future;
* after `Inbox.stop` and `PrepareThread.refuse` no new work is accepted; what is under way ends, at the latest when the clip
  reader is closed or the engine's step is over;
* every wait has a limit, or is woken by the work that it waits for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from rollout.engine.engine import Engine
from rollout.groups import Group
from rollout.staging import StagedWeights
from streams.messages import SwapReport

IDLE_WAKE_S = 5.0
"""How long the engine thread sleeps at most when it has nothing to do; work wakes it at once."""


@dataclass(frozen=True)
class Swap:
    """Weights that wait for the engine thread. fetch_s: seconds that their transfer took."""

    staged: StagedWeights
    fetch_s: float
    future: Future[SwapReport]


class Inbox:
    """What waits for the engine thread. `wait` is that thread's; everything else may be called from any."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._groups: deque[Group] = deque()
        self._swaps: deque[Swap] = deque()
        self._stopped = False

    def put_group(self, group: Group) -> None:
        with self._wake:
            self._groups.append(group)
            self._wake.notify()

    def put_swap(self, swap: Swap) -> None:
        with self._wake:
            self._swaps.append(swap)
            self._wake.notify()

    def stop(self) -> None:
        """End the engine thread after its current step, whatever waits."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def wait(self, engine: Engine) -> tuple[list[Group], list[Swap]] | None:
        """Sleep until there is work, new or in the engine; return what is new, None after `stop`."""
        with self._wake:
            while not (self._stopped or self._groups or self._swaps or engine.busy):
                self._wake.wait(timeout=IDLE_WAKE_S)
            if self._stopped:
                return None
            groups, swaps = list(self._groups), list(self._swaps)
            self._groups.clear()
            self._swaps.clear()
            return groups, swaps


class PrepareThread:
    """One thread that does what is submitted, in order. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None ends the thread
        self._lock = threading.Lock()
        self._refusing = False
        # Not an executor's: its `shutdown(wait=True)` has no limit, and a read that does not end must not keep a stage
        # from starting, nor (being a daemon) the process from ending.
        self._thread = threading.Thread(target=self._loop, name="prepare", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., None], *given: Any) -> None:
        """Queue work; dropped after `refuse`, as `close` settles what is owed for it."""
        with self._lock:
            if not self._refusing:
                self._waiting.put(partial(work, *given))

    def refuse(self) -> None:
        """Drop what is submitted from now on."""
        with self._lock:
            self._refusing = True

    def end(self, timeout_s: float) -> bool:
        """Drop what waits, and wait for the thread to end with what is under way; False if that takes longer."""
        self.refuse()
        with suppress(Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        # No local outlives a round: a clip must not be kept by the thread that waits for the next.
        while self._round():
            pass

    def _round(self) -> bool:
        work = self._waiting.get()
        if work is None:
            return False
        work()
        return True


class BusyShare:
    """The share of time that the engine thread had work. Engine thread only."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._since = time.monotonic()

    def add(self, seconds: float) -> None:
        self._busy_s += seconds

    def take(self, now: float) -> float:
        """Return the share since the last call, in [0, 1]. now: time of the monotonic clock, in seconds."""
        busy, since = self._busy_s, now - self._since
        self._busy_s, self._since = 0.0, now
        return busy / since if since else 0.0

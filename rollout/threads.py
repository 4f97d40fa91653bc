"""How work reaches the threads of a rollout service, and what they share: inbox, work threads, encoded clips, weights.

Invariants:
* nothing here runs a model, reads a clip or settles a future;
* after `Inbox.stop`, `WorkThread.refuse` and `EncodedClips.stop` no new work is accepted; what is under way ends, at the
  latest when the clip reader is closed, or the engine's step or the tower's call is over;
* every wait has a limit, or is woken by the work that it waits for.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rollout.staging import StagedWeights
from streams.messages import SwapReport
from streams.support.doing import doing

if TYPE_CHECKING:
    from rollout.groups import Group

T = TypeVar("T")

IDLE_WAKE_S = 5.0
"""How long a thread sleeps at most when it has nothing to do; work, or room, wakes it at once."""


class StoppedError(RuntimeError):
    """The service closes: what was asked for is not done any more, and that is nobody's failure."""


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

    def wait(self, busy: Callable[[], bool]) -> tuple[list[Group], list[Swap]] | None:
        """Sleep until there is work, new or, if `busy`, left over; return what is new, None after `stop`."""
        with self._wake:
            while not (self._stopped or self._groups or self._swaps or busy()):
                with doing("waits for a group or new weights"):
                    self._wake.wait(timeout=IDLE_WAKE_S)
            if self._stopped:
                return None
            groups, swaps = list(self._groups), list(self._swaps)
            self._groups.clear()
            self._swaps.clear()
            return groups, swaps


class WorkThread:
    """One thread that does what is submitted, in order. Every method may be called from any thread."""

    def __init__(self, name: str) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None ends the thread
        self._lock = threading.Lock()
        self._refusing = False
        # Not an executor's: its `shutdown(wait=True)` has no limit, and a read that does not end must not keep a stage
        # from starting, nor (being a daemon) the process from ending.
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
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
        with doing("waits for work"):
            work = self._waiting.get()
        if work is None:
            return False
        work()
        return True


@dataclass(eq=False)
class Place(Generic[T]):
    """The place of an encoded clip under the budget. Its fields are written by `EncodedClips`, under its lock.

    Attributes:
        key: of the clip; None: it is not looked up by others.
        nbytes: that it counts.
        waiting: groups that wait for the engine with it.
        value: None until it is filled.
        outdated: whether other weights have taken the place of those that made it.
    """

    key: str | None
    nbytes: int
    waiting: int = 1
    value: T | None = None
    outdated: bool = False


class EncodedClips(Generic[T]):
    """Encoded clips under one byte budget: those that wait for the engine, and those that are kept for later groups.

    What waits is never dropped. What is only kept makes room for it, the least recently used first. Every method may be
    called from any thread.

    Invariants:
    * what is here takes at most the budget, or it is one clip;
    * a place is filled only with what the weights of today made, and one whose weights have changed is not handed out again.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self.used = 0
        self.generation = 0
        self._change = threading.Condition()
        self._places: OrderedDict[str, Place[T]] = OrderedDict()
        self._waiting = 0
        self._stopped = False

    def take(self, key: str | None, nbytes: int, *, wait: bool) -> Place[T] | None:
        """Return the place of a clip, in which a group waits from now on. Where it has no value, the caller fills it.

        While what waits leaves no room: sleep until groups have begun to run, if `wait`, else return None. A clip that is
        larger than the budget passes alone. Raises StoppedError after `stop`.
        """
        with self._change:
            while not self._stopped:
                place = None if key is None else self._places.get(key)
                if place is not None:
                    assert key is not None
                    self._places.move_to_end(key)
                    place.waiting += 1
                elif self._make_room(nbytes):
                    place = Place(key, nbytes)
                    self.used += nbytes
                    if key is not None:
                        self._places[key] = place
                if place is not None:
                    self._waiting += 1
                    return place
                if not wait:
                    return None
                with doing("waits for room under data.cache_mb"):
                    self._change.wait(timeout=IDLE_WAKE_S)
            raise StoppedError("the service was closed while a clip waited for room under data.cache_mb")

    def fill(self, place: Place[T], value: T, generation: int) -> bool:
        """Give a place its value; False, and nothing is done, if the weights of that generation are not in use any more."""
        with self._change:
            if generation == self.generation:
                place.value = value
            return generation == self.generation

    def leave(self, place: Place[T]) -> None:
        """End a group's wait: it runs, or it is over. The clip is kept if it may be and has been encoded."""
        with self._change:
            place.waiting -= 1
            self._waiting -= 1
            found = place.key is not None and self._places.get(place.key) is place
            if place.waiting == 0 and found and (place.value is None or place.nbytes > self.budget):
                assert place.key is not None
                del self._places[place.key]
                found = False
            if place.waiting == 0 and not found:
                self.used -= place.nbytes
            self._change.notify_all()

    def outdate(self) -> None:
        """Forget every clip that was encoded: the weights that made them change. Those that wait count until they leave."""
        with self._change:
            self.generation += 1
            for key, place in list(self._places.items()):
                if place.value is not None:
                    place.outdated = True
                    self._forget(key)
            self._change.notify_all()

    def check(self) -> None:
        """Raise StoppedError after `stop`."""
        if self._stopped:
            raise StoppedError("the service was closed while a clip was being encoded")

    def stop(self) -> None:
        """End every wait, and all that asks `check`, with StoppedError."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def __len__(self) -> int:
        return len(self._places)

    def _make_room(self, nbytes: int) -> bool:
        idle = [(key, place.nbytes) for key, place in self._places.items() if not place.waiting]
        if self._waiting and self.used - sum(size for _, size in idle) + nbytes > self.budget:
            return False  # dropping what is kept would not help
        for key, _ in idle:
            if self.used + nbytes <= self.budget:
                break
            self._forget(key)
        return True

    def _forget(self, key: str) -> None:
        place = self._places.pop(key)
        if not place.waiting:
            self.used -= place.nbytes


class WeightsTurn:
    """Who may touch the weights that encode: calls of the tower, or the copy that replaces them.

    Without it an encoding thread could read weights of two versions in one call. The copy comes first: it waits for the call
    that is under way, and the next call waits for the copy.
    """

    def __init__(self, limit_s: float) -> None:
        self._change = threading.Condition()
        self._reading = False
        self._replacing = False
        self._limit_s = limit_s

    @contextmanager
    def read(self) -> Iterator[None]:
        """Keep the weights as they are for the block, one call of the tower. Raises TimeoutError."""
        with self._change:
            self._wait("a clip waited", lambda: not self._replacing)
            self._reading = True
        try:
            yield
        finally:
            with self._change:
                self._reading = False
                self._change.notify_all()

    @contextmanager
    def replace(self) -> Iterator[None]:
        """Keep the tower from being called for the block. Raises TimeoutError."""
        with self._change:
            self._replacing = True
        try:
            with self._change:
                self._wait("new weights waited", lambda: not self._reading)
            yield
        finally:
            with self._change:
                self._replacing = False
                self._change.notify_all()

    def _wait(self, who: str, free: Callable[[], bool]) -> None:
        with doing(f"{who} for the vision tower's weights"):
            in_time = self._change.wait_for(free, self._limit_s)
        if not in_time:
            raise TimeoutError(
                f"{who} rollout.group_deadline_s={self._limit_s:g} for the vision tower's weights: raise it if one call of the "
                "tower may take so long"
            )


class BusyShare:
    """The share of time that the engine thread had work. Engine thread only, but for `lasts`."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._since = time.monotonic()
        self._began: float | None = None  # of the visit that is under way

    def begin(self) -> None:
        """Note that a visit begins."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Note that it is over."""
        assert self._began is not None
        self._busy_s += time.monotonic() - self._began
        self._began = None

    def lasts(self) -> float:
        """Return for how long the visit under way lasts, in seconds; 0 between two. From any thread."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def take(self, now: float) -> float:
        """Return the share since the last call, in [0, 1]. now: time of the monotonic clock, in seconds."""
        busy, since = self._busy_s, now - self._since
        self._busy_s, self._since = 0.0, now
        return busy / since if since else 0.0

"""Futures that a rollout service owes: work that it accepted and has not answered yet.

Invariants:
* a future is settled once: by its result, by its error, or by the end of the service;
* nobody waits for a service that is gone: after `cut_off` no future is open, and none is made.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any


class ServiceClosedError(RuntimeError):
    """The service was closed before this work was done: the end of a stage or of the run, and nobody's failure."""


class Promises:
    """All futures of one service. Every method may be called from any thread."""

    def __init__(self, owner: str) -> None:
        """owner: whom the error of work that was cut off names."""
        self._owner = owner
        self._lock = threading.Lock()
        self._owed: dict[Future[Any], str] = {}
        self._closed = False

    def make(self, what: str) -> Future[Any]:
        """Return a new future for `what`. Raises ServiceClosedError."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise ServiceClosedError(f"{self._owner} was closed before {what} was asked for")
            self._owed[future] = what
        return future

    def settle(self, future: Future[Any], result: Any = None, error: Exception | None = None) -> None:
        """Give a future its result or error, unless it is settled or cancelled already."""
        with self._lock:
            if self._owed.pop(future, None) is None or not future.set_running_or_notify_cancel():
                return
        # Outside the lock: callbacks run here, and may call back into this object.
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def refuse(self) -> None:
        """Make `make` raise from now on."""
        with self._lock:
            self._closed = True

    def cut_off(self) -> None:
        """Settle all that is still owed with ServiceClosedError, and refuse what may come."""
        self.refuse()
        with self._lock:
            owed = list(self._owed.items())
        for future, what in owed:
            self.settle(future, error=ServiceClosedError(f"{self._owner} was closed before {what} was done"))

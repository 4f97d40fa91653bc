"""What a loop waits for: pending calls, each with a handler and words that say what it is.

Invariants: every wait has a timeout and names what did not come; a request to stop is noticed within about a
second, whatever is pending; a dead actor is reported by what it was doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from runtime.stop import StopSignal

SLICE_S = 1.0
"""How long one look at the pending calls lasts: Python runs signal handlers only between two of them."""


@dataclass(frozen=True)
class _Pending:
    what: str
    handle: Callable[[Any], None]
    failed: Callable[[Exception], None] | None


class Events:
    """Pending references and their handlers; `wait` runs the handler of whichever comes first."""

    def __init__(self, timeout_s: float, stop: StopSignal, explain: Callable[[RayActorError], str] = str) -> None:
        """explain: words for a dead actor."""
        self._timeout_s, self._explain = timeout_s, explain
        self._stop = stop
        self._pending: dict[Any, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def expect(
        self,
        reference: Any,
        what: str,
        handle: Callable[[Any], None],
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Call `handle(value)` when `reference` is there; `failed(error)` instead of raising, if given."""
        self._pending[reference] = _Pending(what, handle, failed)

    def wait(self) -> None:
        """Handle one event, or return because a stop was asked for. Raises TimeoutError, RuntimeError."""
        if not self._pending:
            raise RuntimeError("nothing is under way that could be waited for: this is a defect of the loop")
        asked_before = self._stop.requested
        deadline = time.monotonic() + self._timeout_s
        while True:
            left = deadline - time.monotonic()
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=max(0.0, min(SLICE_S, left)))
            if done:
                return self._handle(done[0])
            if self._stop.requested and not asked_before:
                return None
            if left <= 0:
                waiting = "; ".join(entry.what for entry in list(self._pending.values())[:5])
                raise TimeoutError(
                    f"waited {self._timeout_s:g} s (cluster.call_timeout_s) and nothing finished of: {waiting}"
                )

    def _handle(self, reference: Any) -> None:
        entry = self._pending.pop(reference)
        try:
            value = ray.get(reference, timeout=self._timeout_s)
        except RayActorError as error:
            raise RuntimeError(f"an actor died during {entry.what}: {self._explain(error)}") from error
        except (ray.exceptions.RayTaskError, OSError) as error:
            if entry.failed is None:
                raise
            entry.failed(error)
            return
        entry.handle(value)

"""Waiting for actors: one call at a time (`wait_for`), or many calls with a handler each (`Events`).

Invariants:
* every wait has a timeout and names what did not come;
* in a loop, a request to stop is noticed within about a second, whatever is pending;
* in a loop, an actor's death is an event: a handler hears of every call that it leaves without a reply, and then whoever
  made the call, who may make it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from runtime.stop import StopSignal

SLICE_S = 1.0
"""How long one look at the pending calls lasts: Python runs signal handlers only between two of them."""
CALL_LIMIT = "cluster.call_timeout_s"
START_LIMIT = "cluster.start_timeout_s"
MOST_DEATHS = 3
"""Processes of one actor that may die, one after the other, before any has done something."""


class ActorLostError(RuntimeError):
    """An actor died while the run waited for it; its cause is Ray's error."""


class InVain:
    """Counts an actor's processes that died, one after the other, before any of them had done anything."""

    def __init__(self) -> None:
        self._useful: set[str] = set()
        self._causes: dict[str, list[str]] = {}

    def alive(self, name: str) -> None:
        """Note that an actor's present process has done something."""
        self._useful.add(name)
        self._causes.pop(name, None)

    def died(self, name: str, words: str, death: ActorDeath) -> None:
        """Note that it has died. words: of what. Raises RuntimeError, with the first cause, after MOST_DEATHS in vain."""
        causes = self._causes.setdefault(name, [])
        if name not in self._useful:
            causes.append(words)
        self._useful.discard(name)
        if len(causes) >= MOST_DEATHS:
            raise RuntimeError(
                f"{name} died {len(causes)} times in a row before it had done anything, last during {death.what}; the first "
                f"time: {causes[0]}"
            ) from death.error


def wait_for(
    reference: Any,
    timeout_s: float,
    what: str,
    explain: Callable[[RayActorError], str] = str,
    limit: str = CALL_LIMIT,
    look: Callable[[], None] | None = None,
) -> Any:
    """Return the value of `reference`, waiting for it at most `timeout_s` seconds.

    limit: the config key that `timeout_s` comes from. explain: words for a dead actor. look: called about once a second
    meanwhile. Raises TimeoutError and ActorLostError, which say what was waited for and who died of what.
    """
    deadline = time.monotonic() + timeout_s
    while look is not None and (left := deadline - time.monotonic()) > 0:
        look()
        if ray.wait([reference], timeout=min(SLICE_S, left))[0]:
            break
    try:
        return ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
    except GetTimeoutError as error:
        raise TimeoutError(f"waited {timeout_s:g} s for {what}; raise {limit} if it is only slow") from error
    except RayTaskError:
        raise  # the call's own error, with its type
    except RayError as error:
        if (death := death_of(error, reference)) is not None:
            raise ActorLostError(f"an actor died while the run waited for {what}: {explain(death)}") from death
        raise _in_words(error, what) from error


def death_of(error: BaseException, reference: Any) -> RayActorError | None:
    """Return the actor's death that the reply `reference` failed with; None for another error.

    Of an actor that Ray's memory monitor has ended Ray tells by an error of its own, which does not name the actor.
    """
    if isinstance(error, RayActorError):
        return error
    if isinstance(error, OutOfMemoryError) and isinstance(reference, ray.ObjectRef):
        actor = reference.task_id().actor_id()
        if actor.is_nil():
            return None  # a task's
        return RayActorError(actor.hex(), f"its node ran out of memory: {str(error).strip()}")
    return None


def _in_words(error: RayError, what: str) -> RuntimeError:
    """Return Ray's own failure, such as a node without memory, as an error that the run ends with."""
    return RuntimeError(f"{what} failed: {type(error).__name__}: {str(error).strip()}")


def first_line(words: object) -> str:
    return str(words).partition("\n")[0]


def lost_with_an_actor(error: Exception) -> bool:
    """Return whether a call failed because what it was given is gone: whoever had it in memory has died."""
    return isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError)


@dataclass(frozen=True)
class ActorDeath:
    """A call that stays without a reply, because its actor died. what: the call; error: which actor, of what."""

    what: str
    error: RayActorError


@dataclass(frozen=True)
class _Pending:
    what: str
    handle: Callable[[Any], None]
    failed: Callable[[Exception], None] | None
    lost: Callable[[], None] | None
    own_limit: bool


class Events:
    """Pending references and their handlers; `wait` runs the handler of whichever comes first."""

    def __init__(
        self,
        timeout_s: float,
        stop: StopSignal,
        on_death: Callable[[ActorDeath], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """on_death: called once for every pending call of an actor that died. If it returns, waiting goes on.

        look: called at every wait, and about once a second while it lasts.
        """
        self._timeout_s, self._stop, self._on_death, self._look = timeout_s, stop, on_death, look
        self._pending: dict[Any, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def expect(
        self,
        reference: Any,
        what: str,
        handle: Callable[[Any], None],
        failed: Callable[[Exception], None] | None = None,
        lost: Callable[[], None] | None = None,
        *,
        own_limit: bool = False,
    ) -> None:
        """Call `handle(value)` when `reference` is there; `failed(error)` instead of raising, if given.

        lost: called if the actor died, once `on_death` has returned. own_limit: whoever expects it gives it up in time, in
        `look`.
        """
        self._pending[reference] = _Pending(what, handle, failed, lost, own_limit)

    def forget(self, reference: Any) -> None:
        """Wait for `reference` no more."""
        self._pending.pop(reference, None)

    def wait(self) -> None:
        """Handle one event, or return because a stop was asked for, or nothing is left that must come within a limit.

        Raises TimeoutError, RuntimeError.
        """
        if not self._pending:
            raise RuntimeError("nothing is under way that could be waited for: this is a defect of the loop")
        asked_before = self._stop.requested
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._look()
            if not self._pending:
                return None
            left = deadline - time.monotonic()
            limited = any(not entry.own_limit for entry in self._pending.values())
            slice_s = max(0.0, min(SLICE_S, left)) if limited else SLICE_S
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=slice_s)
            if done:
                return self._handle(done[0])
            if not limited or (self._stop.requested and not asked_before):
                return None
            if left <= 0 and limited:
                waiting = "; ".join(entry.what for entry in list(self._pending.values())[:5])
                raise TimeoutError(f"waited {self._timeout_s:g} s ({CALL_LIMIT}) and nothing finished of: {waiting}")

    def _handle(self, reference: Any) -> None:
        entry = self._pending.pop(reference)
        try:
            value = ray.get(reference, timeout=self._timeout_s)
        except (RayTaskError, OSError) as error:
            if entry.failed is None:
                raise
            entry.failed(error)
            return
        except RayError as error:
            if (death := death_of(error, reference)) is None:
                if entry.failed is None:
                    raise _in_words(error, entry.what) from error
                entry.failed(_in_words(error, entry.what))
                return
            self._on_death(ActorDeath(entry.what, death))
            if entry.lost is not None:
                entry.lost()
            return
        # Outside the try: what a handler raises is its own, never taken for the reply's failure.
        entry.handle(value)

"""Watches what every run hangs on: Ray's GCS, and the raylet of the driver's node.

Without the GCS actors go on, but nothing new can be started, and NATIVE_S after it was lost Ray's native code ends the
driver, the raylets and the actors without a word. Without its raylet a node's actors end within seconds.

Invariants:
* a busy machine is not taken for a loss: the kernel answers both questions, whatever the processes are doing;
* the GCS counts as lost after LOST_S of failures, and FAILURES of them at least, so that one that starts anew is waited for;
* the watch has a thread of its own, calls no function of Ray's there, and tells of one loss at most.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from runtime.stop import Requeue, StopSignal

LOST_S = 15.0
FAILURES = 4
GCS_POLL_S = 2.0
RAYLET_POLL_S = 0.5
CONNECT_S = 5.0
SPARE_S = 15.0
"""What is left for the tracker and the last words before Ray's native code ends the process."""
NATIVE_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
NATIVE_S = 60.0
LISTENS = "00010000"
"""Flag of a socket in /proc/net/unix that takes connections."""
SOCKETS = Path("/proc/net/unix")


@dataclass(frozen=True)
class RayLoss:
    """words: what is lost, and what that means. usable_s: how long the actors may still be asked; 0: they are gone, too."""

    words: str
    usable_s: float


class Lifeline:
    """Watches from `start` to `close`. gcs: HOST:PORT. raylet: the path of its socket."""

    def __init__(self, gcs: str, raylet: str, told: Callable[[RayLoss], None], lost_s: float = LOST_S) -> None:
        """told: called in the watch's thread. lost_s: seconds of failures after which the GCS counts as lost."""
        self._gcs, self._raylet, self._told, self._lost_s = gcs, raylet, told, lost_s
        # In another network namespace than its raylet a driver does not see it there.
        self._sees_raylet = _listens(raylet)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    @classmethod
    def of_this_driver(cls, told: Callable[[RayLoss], None]) -> Lifeline:
        """Return the watch for the Ray that this process has joined."""
        context = ray.get_runtime_context()
        here = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
        return cls(context.gcs_address, here[0] if here else "", told)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def look(self) -> RayLoss | None:
        """Return the loss of the raylet, if it is lost, for errors that come of it before the watch sees it."""
        if not self._sees_raylet or _listens(self._raylet):
            return None
        words = (
            f"the raylet of this node, Ray's own process ({self._raylet}), is gone: it was killed, by hand or for lack of "
            "memory, or it crashed. It takes this node's actors along"
        )
        # `ray start --block` ends a node when one of its processes does.
        if (error := _refusal(self._gcs)) is not None:
            words = f"Ray's GCS at {self._gcs} does not answer ({error}), and {words}"
        return RayLoss(words, 0.0)

    def _watch(self) -> None:
        failures, since, asked = 0, 0.0, -GCS_POLL_S
        while not self._closed.wait(RAYLET_POLL_S):
            loss = self.look()
            if loss is None and time.monotonic() - asked >= GCS_POLL_S:
                asked = time.monotonic()
                error = _refusal(self._gcs)
                failures, since = (failures + 1, since if failures else asked) if error else (0, 0.0)
                silent_s = time.monotonic() - since
                if failures >= FAILURES and silent_s >= self._lost_s:
                    loss = self._gcs_loss(str(error), silent_s)
            if loss is not None:
                if not self._closed.is_set():
                    self._told(loss)
                return

    def _gcs_loss(self, error: str, silent_s: float) -> RayLoss:
        return RayLoss(
            f"Ray's GCS at {self._gcs} has not answered for {silent_s:.0f} s ({error}): the head node or its gcs_server "
            "process is gone, and Ray cannot start anything any more",
            max(0.0, native_s() - silent_s - SPARE_S),
        )


class RayGuard:
    """What a run does about a loss of Ray: it asks its stop signal for an end."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._lifeline: Lifeline | None = None

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Join or start Ray inside; it is watched from then on."""
        with self._stop.lent():
            yield
        self._lifeline = Lifeline.of_this_driver(self._lost)
        self._lifeline.start()

    def judge(self, stage: str, error: Exception) -> None:
        """Raise Requeue if the error of a stage comes of Ray's loss, whichever of both was noticed first."""
        if self._lifeline is not None and (loss := self._lifeline.look()) is not None:
            self._lost(loss)
        if self._stop.loss:
            raise Requeue(f"{stage} ended with: {str(error).partition(chr(10))[0]}") from error

    def close(self) -> None:
        """End the watch: what ends from now on ends as it should."""
        if self._lifeline is not None:
            self._lifeline.close()

    def _lost(self, loss: RayLoss) -> None:
        self._stop.lose(loss.words, loss.usable_s)


def native_s() -> float:
    """Return after how many seconds without a GCS Ray's native code ends its processes."""
    given = os.environ.get(NATIVE_VARIABLE, "")
    return float(given) if given.isdigit() else NATIVE_S


def _listens(path: str) -> bool:
    """Whether a process takes connections at this socket: its entry goes when the process does."""
    lines = (line.split() for line in SOCKETS.read_text(errors="replace").splitlines()) if SOCKETS.is_file() else ()
    return any(fields[-1] == path and fields[3] == LISTENS for fields in lines)


def _refusal(address: str) -> OSError | None:
    """Return why nobody takes connections at HOST:PORT; None if somebody does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            return None
    except OSError as error:
        return error

"""A polite end: SIGTERM, or a terminal that goes away (SIGHUP), asks for a checkpoint and a status that means "run me again".

Invariants:
* while a training loop runs, the first signal only sets a flag, and the loop acts on it between two steps;
* anywhere else there is nothing to save, and a signal ends the run at once;
* under `nohup`, which has SIGHUP ignored, it stays ignored;
* after the grace time the process ends whatever it is doing, with the same status.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE_STATUS = 75
"""sysexits' EX_TEMPFAIL: a failure that the same command will not meet again."""


class Requeue(BaseException):
    """The run stopped because it was asked to; the same command continues from the checkpoint it names.

    It is no Exception: like KeyboardInterrupt it may be raised anywhere, and must pass handlers of other failures.
    """


class StopSignal:
    """Listens for SIGTERM and SIGHUP once installed. `last_checkpoint`: the newest complete one, for messages."""

    def __init__(self, grace_s: float = 60.0, status: int = REQUEUE_STATUS) -> None:
        self.grace_s, self.status = grace_s, status
        self.last_checkpoint = "none"
        self._asked = threading.Event()
        self._deferred = False
        self._hang_up = signal.getsignal(signal.SIGHUP)

    @property
    def requested(self) -> bool:
        return self._asked.is_set()

    @property
    def goes_on(self) -> str:
        """What the same command would do, in words."""
        known = self.last_checkpoint
        return f"goes on from {known}" if known != "none" else "starts again what was not finished"

    def install(self) -> None:
        """Install the handler."""
        signal.signal(signal.SIGTERM, self._on_signal)
        if self._hang_up is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Wrap `ray.init`, which replaces our handler: turn its SystemExit into Requeue, and install our handler again.

        What it starts ignores SIGHUP, which a terminal that goes away sends to all of them: without Ray there would be no
        checkpoint.

        In the last moments of `ray.init` (under a second) Ray's native handler aborts the process: nothing is lost
        then, but the exit status is not ours.
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        except SystemExit:
            self._asked.set()
            raise Requeue("stopped while Ray was starting") from None
        finally:
            self.install()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`, which the loop acts on between two steps. Outside, it raises Requeue."""
        if self.requested:
            raise Requeue("stopped before the stage began")
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self._asked.set()
        timer = threading.Timer(self.grace_s, self._out_of_time)
        timer.daemon = True
        timer.start()
        if not self._deferred:
            raise Requeue(f"stopped between the stages' steps, the last complete checkpoint is {self.last_checkpoint}")

    def _out_of_time(self) -> None:
        print(
            f"stopping: no checkpoint within checkpoint.grace_s={self.grace_s:g} s of the signal; the last complete one "
            f"is {self.last_checkpoint}; exit status {self.status} (requeue)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(self.status)

"""A polite end: SIGTERM, or a terminal that goes away (SIGHUP), asks for a checkpoint and a status that means "run me again".

A loss of Ray (`runtime.recovery.lifeline`) asks for the same as long as the actors answer; the run has failed then.

Invariants:
* while a training loop runs, the first signal only sets a flag, and the loop acts on it between two steps;
* anywhere else there is nothing to save, and a signal ends the run at once;
* under `nohup`, which has SIGHUP ignored, it stays ignored;
* after the grace time the process ends whatever it is doing, with the same status;
* once Ray is lost, a loop that is not done in time is interrupted, so that the tracker is told before the process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE_STATUS = 75
"""sysexits' EX_TEMPFAIL: a failure that the same command will not meet again."""


CLOSES_S = 10.0
"""What is left for the tracker and the last words after a loss of Ray."""
LOST_STATUS = 1


class Requeue(BaseException):
    """The run stopped because it was asked to; the same command continues from the checkpoint it names.

    It is no Exception: like KeyboardInterrupt it may be raised anywhere, and must pass handlers of other failures.
    """


class StopSignal:
    """Listens for SIGTERM and SIGHUP once installed.

    Attributes:
        last_checkpoint: the newest complete one, for messages.
        loss: what was lost without which the run cannot go on, in words; empty as long as nothing is.
    """

    def __init__(self, grace_s: float = 60.0, status: int = REQUEUE_STATUS) -> None:
        self.grace_s, self.status = grace_s, status
        self.last_checkpoint = "none"
        self.loss = ""
        self._asked = threading.Event()
        self._deferred = self._hurried = False
        self._hang_up = signal.getsignal(signal.SIGHUP)

    @property
    def requested(self) -> bool:
        return self._asked.is_set() or bool(self.loss)

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

    def lose(self, words: str, usable_s: float) -> None:
        """Ask for a stop because something is lost. Any thread may call it; the first loss counts.

        usable_s: how long a loop may try to write a checkpoint (no longer than the grace time); 0: it is interrupted.
        """
        if self.loss:
            return
        self.loss = words
        usable_s = min(usable_s, self.grace_s)
        _after(usable_s + CLOSES_S, self._out_of_time)
        if usable_s:
            _after(usable_s, self._hurry)
            self._wake()
        else:
            self._hurry()

    def _hurry(self) -> None:
        self._hurried = True
        self._wake()

    def _wake(self) -> None:
        """Have the main thread, the only one that may be interrupted, run our handler."""
        main = threading.main_thread().ident
        assert main is not None, "it runs"
        signal.pthread_kill(main, signal.SIGTERM)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        first = not self._asked.is_set()
        self._asked.set()
        if first and not self.loss:
            _after(self.grace_s, self._out_of_time)
        if self._deferred and self._hurried:
            self._deferred = False
            raise Requeue(f"no further checkpoint was written, the last complete one is {self.last_checkpoint}")
        if first and not self._deferred:
            raise Requeue(f"stopped between the stages' steps, the last complete checkpoint is {self.last_checkpoint}")

    def _out_of_time(self) -> None:
        if self.loss:
            print(
                f"error: {self.loss}\nThe run did not end by itself\nthe same command with resume=auto {self.goes_on}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST_STATUS)
        print(
            f"stopping: no checkpoint within checkpoint.grace_s={self.grace_s:g} s of the signal; the last complete one "
            f"is {self.last_checkpoint}; exit status {self.status} (requeue)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(self.status)


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()

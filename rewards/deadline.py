"""A deadline for code that is not ours and may never end: a user's reward.

Invariants:
* the clock is real time, and Python code is interrupted wherever it is, a sleep or a wait included;
* native code that does not return to Python cannot be: within GRACE_S its process ends, where `Watchdog.start` was called,
  with its stacks in a file, whether or not that code lets other threads run;
* it works in a process's main thread, where a scorer computes, and does nothing elsewhere.
"""

from __future__ import annotations

import faulthandler
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

AGAIN_S = 1.0
"""Code that goes on after the interrupt is interrupted again, so often."""
GRACE_S = 3.0
"""What code is given to be interrupted, at most, before its process ends."""


class Watchdog:
    """Ends this process when code cannot be interrupted. It is one for the process, as that of faulthandler is.

    To set it takes a thread, longer than most rewards take: it is set once for all code of a second.
    """

    def __init__(self) -> None:
        self._file: Callable[[], TextIO] | None = None
        self._set_at = -math.inf

    def start(self, file: Callable[[], TextIO]) -> None:
        """Watch from now on. file: returns what the stacks are written to."""
        self._file = file

    def expect(self, seconds: float) -> None:
        """End the process unless `rest`, or this, is called within so many seconds and GRACE_S, or up to AGAIN_S less."""
        now = time.monotonic()
        if self._file is not None and now - self._set_at > AGAIN_S:
            # Its thread is none of Python's: it needs no lock that stuck code may hold.
            faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=self._file())
            self._set_at = now

    def rest(self) -> None:
        """Watch no code until `expect` is called."""
        if self._set_at > -math.inf:
            faulthandler.cancel_dump_traceback_later()
            self._set_at = -math.inf


WATCHDOG = Watchdog()


class OutOfTimeError(BaseException):
    """The deadline has passed. No Exception: a handler around a retry must not take it for a failure of its own."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside once so many seconds are over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTimeError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    WATCHDOG.expect(seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        finally:  # the deadline may pass at the last moment, in here
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

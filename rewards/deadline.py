"""A deadline for code that is not ours and may never end: a user's reward.

Invariants:
* the clock is real time, and Python code is interrupted wherever it is, a sleep or a wait included; native code that never
  returns to Python is not;
* it works in a process's main thread, where a scorer computes, and does nothing elsewhere.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN_S = 1.0
"""Code that goes on after the interrupt is interrupted again, so often."""


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
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        finally:  # the deadline may pass at the last moment, in here
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

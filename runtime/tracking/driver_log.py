"""Copies what the driver prints into `run_root/logs/driver.log`: progress, warnings and errors of every attempt.

`launch.py` replaces stdout and stderr by a `Tee` before anything is printed, and opens the file once the run may write to
its run_root. What native code writes to the file descriptors does not pass here.

Invariants:
* passwords in addresses reach neither place (`streams.support.redact`);
* a closed pipe, a full disk, and characters that the terminal does not know lose output, never the run;
* the file rotates.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from streams.support.redact import redact
from streams.support.terminal import escape_unprintable_output

FILE = "driver.log"
MAX_BYTES = 16 * 2**20
BACKUPS = 2
KEPT_LINES = 1000
"""Lines kept until the run_root is known."""
REWRITTEN_S = 30.0
"""Seconds between copies in the file of a line that is rewritten in place on the terminal; its last version also goes in."""

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class DriverLog:
    """The file behind both streams. Lines printed before `open` are kept and written then.

    outlives_readers: True = the process goes on if the reader of its pipe ends (`| head`).
    """

    def __init__(self) -> None:
        self.outlives_readers = False
        self._waiting: deque[str] = deque(maxlen=KEPT_LINES)
        self._handler: _Handler | None = None
        self._tees: list[Tee] = []

    def install(self) -> None:
        """Put this log behind sys.stdout and sys.stderr."""
        escape_unprintable_output()  # a category in a script that the terminal does not know must not end a run
        self._tees = [Tee(sys.stdout, self), Tee(sys.stderr, self)]
        sys.stdout, sys.stderr = self._tees

    def open(self, root: Path, command: str) -> None:
        """Write to `root/logs/driver.log` from now on, below a line that names this attempt. Does nothing the second time."""
        if self._handler is not None or not self._tees:
            return
        try:
            (root / "logs").mkdir(parents=True, exist_ok=True)
            self._handler = _Handler(root / "logs" / FILE, self._cannot)
        except OSError as error:
            self._cannot(error)
            return
        self.line(f"=== {socket.gethostname()}, pid {os.getpid()}: {redact(command)}")
        while self._waiting:
            self.line(self._waiting.popleft())

    def leave(self) -> None:
        """Close the file: what is said from now on waits for the next `open`."""
        if self._handler is not None:
            self._handler.close()
            self._handler = None

    def line(self, text: str) -> None:
        """Write one line, without terminal control sequences."""
        text = _CONTROL.sub("", text).rstrip()
        if not text:
            return
        if self._handler is None:
            self._waiting.append(text)
        else:
            self._handler.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """Write lines that have no end yet. Called at exit."""
        for tee in self._tees:
            tee.finish()

    def _cannot(self, error: BaseException | None) -> None:
        if self._tees:
            self._tees[1].terminal(f"warning: {FILE} under run_root/logs cannot be written, the run goes on: {error}\n")


class _Handler(RotatingFileHandler):
    """Reports the first failure to write by `failed`; later lines are tried again."""

    def __init__(self, path: Path, failed: Callable[[BaseException | None], None]) -> None:
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._failed: Callable[[BaseException | None], None] | None = failed

    def handleError(self, record: logging.LogRecord) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed(sys.exc_info()[1])


class Tee(io.TextIOBase):
    """A text stream that replaces sys.stdout or sys.stderr, which may be None. All else is delegated to that stream."""

    def __init__(self, stream: TextIO | None, log: DriverLog) -> None:
        self._stream, self._log = stream, log
        self._lock = threading.RLock()
        self._begun, self._rewritten_at = "", 0.0

    def write(self, text: str) -> int:
        shown = redact(text)
        self.terminal(shown)
        with self._lock:
            *lines, rest = (self._begun + shown).split("\n")
            for line in lines:
                self._log.line(line.rstrip("\r").rpartition("\r")[2])
            self._begun = self._latest(rest)
        return len(text)

    def _latest(self, rest: str) -> str:
        """Return the last version of a line that has no end yet; every REWRITTEN_S one version goes into the log."""
        before, rewritten, now = rest.rpartition("\r")
        if rewritten and before.strip() and time.monotonic() - self._rewritten_at > REWRITTEN_S:
            self._rewritten_at = time.monotonic()
            self._log.line(before.rpartition("\r")[2])
        return f"\r{now}" if rewritten else rest

    def terminal(self, text: str) -> None:
        """Write to the stream alone."""
        self._guarded(lambda stream: stream.write(text))

    def flush(self) -> None:
        self._guarded(lambda stream: stream.flush())

    def finish(self) -> None:
        """Flush; a line without an end goes into the log as it is."""
        with self._lock:
            rest, self._begun = self._begun, ""
        self._log.line(rest.rpartition("\r")[2])
        try:
            self.flush()
        except BrokenPipeError:
            self._to_nowhere()

    def _guarded(self, act: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            act(self._stream)
        except BrokenPipeError:
            if not self._log.outlives_readers:
                raise
            self._to_nowhere()
        except (OSError, ValueError):  # a full disk behind `> file`; a terminal or file that is closed
            return

    def _to_nowhere(self) -> None:
        """Redirect the stream to /dev/null, as the Python manual advises for EPIPE.

        Otherwise the flush at exit would fail again and set the exit status.
        """
        if self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

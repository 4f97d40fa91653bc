"""The log of one actor, in a file named after it: run_root/logs/<actor>.log.

`runtime.cluster.session` sets the actor's name and the folder in its environment; each actor's constructor calls
`open_actor_log`.

Invariants:
* a crash of the interpreter (segmentation fault, abort) leaves its stack in the same file;
* STACKS_SIGNAL has the stacks of all threads written there, whatever the process is doing;
* code that is stuck leaves its stacks there, too, if whoever watches it writes to `crash_file`;
* the file rotates;
* passwords and tokens do not reach it (`streams.support.redact`);
* an actor whose folder cannot be written runs without a log.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import TextIO

from streams.support.redact import redact

ACTOR_VARIABLE = "SIGHTLINE_ACTOR"
FOLDER_VARIABLE = "SIGHTLINE_LOG_DIR"
STARTS = " starts:"
"""In the first line of every process: a file holds those of all attempts."""
STACKS_SIGNAL = signal.SIGUSR1
MAX_BYTES = 16 * 2**20
BACKUPS = 2

log = logging.getLogger("sightline.actor")


def log_path(folder: Path, actor: str) -> Path:
    return folder / f"{actor}.log"


def open_actor_log() -> Path | None:
    """Send this process's log records, warnings and crash stacks to the actor's file.

    Returns the file; None if this process is no actor, or if the file cannot be written.
    """
    actor, folder = os.environ.get(ACTOR_VARIABLE), os.environ.get(FOLDER_VARIABLE)
    if not actor or not folder:
        return None
    path = log_path(Path(folder), actor)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _CrashAwareHandler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
    except OSError as error:
        print(f"{actor}: no log in {path}: {error}", file=sys.stderr, flush=True)
        return None
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("sightline").setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_exception
    sys.excepthook = _log_exception
    log.info(
        "%s%s host %s, pid %d, python %s", actor, STARTS, socket.gethostname(), os.getpid(), sys.version.split()[0]
    )
    return path


class _Redacting(logging.Formatter):
    """Masks secrets in the whole entry: a traceback may show an address with its password."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def crash_file() -> TextIO:
    """Return the file that stacks are written to: the log, or stderr for a process without one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _CrashAwareHandler) and handler.stream is not None:
            return handler.stream
    return sys.stderr


class _CrashAwareHandler(RotatingFileHandler):
    """A rotating log file that also receives crash stacks."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        # It writes to a file descriptor, so it must be enabled anew for every file that a rotation opens.
        faulthandler.enable(stream, all_threads=True)
        faulthandler.register(STACKS_SIGNAL, stream, all_threads=True)
        return stream


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.error("uncaught", exc_info=(kind, error, trace))


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread is not None else "?"
        log.error("uncaught in thread %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

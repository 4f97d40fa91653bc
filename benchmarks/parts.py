"""Runs one part of a benchmark as a process with a time limit, and shows what it prints as it prints it.

Invariants:
* every line is shown and handed on when it comes, so what a part has told is kept if it is cut off;
* a part that is out of time is interrupted first, so that it can write its report, then killed with all that it started in
  its process group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

INTERRUPT_S = 20.0
"""Seconds from the interrupt of a part that is out of time to its end: a run closes its Ray, pytest writes its report."""
SHOWN = 20
"""Last lines that a result keeps."""


@dataclass(frozen=True)
class Ran:
    """How a part ended. status: of the process. cut_off: whether it was out of time. last: its last lines."""

    status: int
    seconds: float
    cut_off: bool
    last: tuple[str, ...]


def run_part(
    command: list[str], cwd: Path, limit_s: float | None, on_line: Callable[[str], None] = lambda line: None
) -> Ran:
    """Run the command to its end, at most `limit_s` seconds (None: no limit) and INTERRUPT_S to stop.

    on_line: called with every line of its output and errors, from a thread of its own.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=SHOWN)
    # A thread: a part that hangs prints nothing, and a line that never comes has no timeout.
    reader = threading.Thread(target=_read, args=(process.stdout, last, on_line), daemon=True)
    reader.start()
    cut_off = False
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        cut_off = True
        print(f"benchmarks: out of time after {limit_s:.0f} s: {' '.join(command[1:4])}", flush=True)
    finally:
        # Also when this process itself is interrupted.
        _end(process)
    reader.join(timeout=5.0)
    return Ran(process.returncode, round(time.monotonic() - began, 1), cut_off, tuple(last))


def _read(lines: IO[str], last: deque[str], on_line: Callable[[str], None]) -> None:
    for text in lines:
        line = text.rstrip("\n")
        print(line, flush=True)
        last.append(line)
        on_line(line)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=INTERRUPT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=INTERRUPT_S)

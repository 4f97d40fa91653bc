"""`launch.py` as a user starts it: run to its end or interrupted, and what it logged.

Invariant: no process that was started here outlives the call that started it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.project import ROOT

LIMIT_S = 420


@dataclass(frozen=True)
class Finished:
    """A launched command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    pid: int


def launch(*overrides: str, limit_s: float = LIMIT_S, env: dict[str, str] | None = None) -> Finished:
    """Run `python launch.py OVERRIDES`; after `limit_s` it is ended with everything it started."""
    process = subprocess.Popen(
        [sys.executable, "launch.py", *overrides],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | (env or {}),
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=30)
        pytest.fail(f"launch.py {' '.join(overrides)} did not end within {limit_s} s:\n{stdout}\n{stderr}")
    return Finished(process.returncode, stdout, stderr, process.pid)


def _catches(pid, signum) -> bool:
    (mask,) = re.findall(r"(?m)^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signum - 1) & 1)


def interrupted(*words, after=0.0, ready=""):
    """Interrupt `launch.py WORDS` and check that no process of it is left. Returns (status, output, error output).

    `after` counts from when it handles signals: how long Python takes to import the command itself is the machine's.
    """
    process = subprocess.Popen(
        [sys.executable, "launch.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    shown = ""
    if ready:
        while ready not in shown:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            shown += line
    give_up = time.monotonic() + 60
    while not _catches(process.pid, signal.SIGTERM):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up, "the command handles no signals"
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    # Whoever holds the group would answer; a child that is ending gets a moment.
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a child was left over")
    return process.returncode, shown + out, err


STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")


def kept(root) -> list[str]:
    """Return the lines of the log, without their times."""
    lines = (root / "logs" / "driver.log").read_text().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line) for line in lines]

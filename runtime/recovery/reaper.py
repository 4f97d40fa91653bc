"""Ends what a local Ray leaves behind when its driver is killed: some of its processes would stay for a minute.

It is a process of its own, with a pipe from the driver as its standard input: the pipe ends when the driver does. It is run by
its path, and imports nothing of ours.

Invariants:
* it ends no process but those that write files of this Ray's session, and none while the driver lives;
* it ends GRACE_S after its driver at most, and does not listen to the terminal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 5.0
"""What Ray's processes are given to end by themselves."""

_started: list[subprocess.Popen[bytes]] = []
"""The reapers of this driver. Their pipes stay open as long as it lives."""


def start(session: str) -> None:
    """Start a reaper for the Ray that this process has started. session: its folder."""
    command = [sys.executable, "-S", "-E", __file__, session]
    _started.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


def holders(session: str) -> dict[int, str]:
    """Return the processes that have files below this folder open for writing, and when each began."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            if any(_writes(link, session) for link in (process / "fd").iterdir()):
                found[int(process.name)] = _began(int(process.name))
    return found


def _writes(link: Path, session: str) -> bool:
    """Whether an open file is below the session's folder, and open for writing: whoever reads the logs there is not Ray."""
    with contextlib.suppress(OSError):  # it is closed by now
        if os.readlink(link).startswith(f"{session}/"):
            info = link.parent.with_name("fdinfo") / link.name
            flags = next(line for line in info.read_text().splitlines() if line.startswith("flags:"))
            return bool(int(flags.split()[1], 8) & (os.O_WRONLY | os.O_RDWR))
    return False


def _began(pid: int) -> str:
    """When a process began, as the kernel counts; empty if there is none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def reap(session: str, driver: int) -> None:
    """Wait until the driver is gone, and end what is left of its Ray."""
    sys.stdin.buffer.read()
    left = holders(session)
    deadline = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = {pid: began for pid, began in left.items() if _began(pid) == began}
    if os.getppid() == driver:
        return
    for pid, began in left.items():
        if _began(pid) == began:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    reap(sys.argv[1], os.getppid())

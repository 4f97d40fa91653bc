"""Processes of a run, as the kernel lists them: who descends from whom, and who is there still."""

from __future__ import annotations

import contextlib
from pathlib import Path


def began(pid: int) -> str:
    """When a process began, as the kernel counts; empty if it is gone, or only waits for its parent to look."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""


def command(pid: int) -> str:
    """The command line of a process; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def family(pid: int) -> dict[int, str]:
    """A process and all that descend from it -> when they began."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        here = todo.pop()
        found[here] = began(here)
        todo += children.get(here, [])
    return {pid: when for pid, when in found.items() if when}


def logging_to(folder: Path) -> dict[int, str]:
    """The actors of a run that log to this folder, and their children -> when they began."""
    wanted = f"SIGHTLINE_LOG_DIR={folder.resolve()}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = began(int(process.name))
    return {pid: when for pid, when in found.items() if when}


def still_there(known: dict[int, str]) -> list[int]:
    """Those of these processes that have not ended."""
    return [pid for pid, when in known.items() if began(pid) == when]

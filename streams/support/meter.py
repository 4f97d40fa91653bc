"""What a process's device holds, and where its time and memory go, phase by phase.

On CUDA: torch's own allocator, exact. Elsewhere: the process's resident memory, which counts Python and
its libraries, too. Phases of one meter do not nest; they belong to one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from streams.support.usage import DeviceInfo, PhaseUsage

PROC = Path("/proc/self")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def device_info(node: str) -> DeviceInfo:
    """The first CUDA device that this process may use, or the node's host memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        held = torch.cuda.memory_allocated()
        return DeviceInfo(f"{node}/{properties.uuid}", f"{properties.name} on {node}", True, total, free, held)
    total, free = host_memory()
    return DeviceInfo(f"{node}/host", f"the host memory of {node}", False, total, free, _status("VmRSS"))


def host_memory() -> tuple[int, int]:
    """(total, free) bytes of the node's memory, or of the container that this process runs in."""
    sizes = {name.rstrip(":"): value * 1024 for name, value in _table(MEMINFO).items()}
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        # Not Linux: how much is free cannot be asked without another package.
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None and limit < total:
        # Files that were read lately count as used, but give way: after a download they are most of it.
        used -= _table(CGROUP / "memory.stat").get("inactive_file", 0)
        return limit, min(free, max(0, limit - used))
    return total, free


def _table(path: Path) -> dict[str, int]:
    """Name and number of every line of a file of the kernel's; empty where there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file of the kernel's; None if there is no such file, or no limit in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _status(key: str) -> int:
    """Bytes that the kernel counts of this process under `key`; 0 where it does not say."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


class Meter:
    """Seconds, calls and peak bytes by phase."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self._phases: dict[str, PhaseUsage] = {}

    @contextmanager
    def phase(self, name: str, *, peak: bool = True) -> Iterator[None]:
        """Count what happens inside to `name`. On CUDA it waits for the device at both ends: its time is the device's.

        peak: also take the most bytes held meanwhile (0.1 ms on a CPU).
        """
        if peak:
            self._reset()
        began = time.monotonic()
        try:
            yield
        finally:
            if self.cuda:
                torch.cuda.synchronize()
            before = self._phases.get(name, PhaseUsage(0.0, 0, 0))
            held = self._peak() if peak else 0
            self._phases[name] = PhaseUsage(
                before.seconds + time.monotonic() - began, before.calls + 1, max(before.peak, held)
            )

    def usage(self) -> dict[str, PhaseUsage]:
        return dict(self._phases)

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            # The kernel's own high-water mark of this process starts anew.
            (PROC / "clear_refs").write_text("5")
        except OSError:
            return

    def _peak(self) -> int:
        if self.cuda:
            return int(torch.cuda.max_memory_allocated())
        return _status("VmHWM")

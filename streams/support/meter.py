"""Measures the memory of a process's device, and the time and memory of its phases.

On CUDA the numbers are those of torch's allocator, exact. Elsewhere they are the process's resident memory, which includes
Python and its libraries.

Invariants:
* phases of one meter do not nest;
* the phase that a thread is in is told to whoever asks (`streams.support.doing`);
* one thread calls `phase` and `repeated`; others may call `beside`, and any may ask for `usage`;
* a phase that repeats or runs beside costs no synchronisation and no reset, so throughput may be measured around it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from streams.support.doing import doing
from streams.support.usage import DeviceInfo, PhaseUsage

PROC = Path("/proc/self")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def device_info(node: str) -> DeviceInfo:
    """Return the first CUDA device that this process may use, or the node's host memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        held = torch.cuda.memory_allocated()
        return DeviceInfo(f"{node}/{properties.uuid}", f"{properties.name} on {node}", True, total, free, held)
    total, free = host_memory()
    return DeviceInfo(f"{node}/host", f"the host memory of {node}", False, total, free, _status("VmRSS"))


def host_memory() -> tuple[int, int]:
    """Return (total, free) bytes of the node's memory, or of the container that this process runs in."""
    sizes = {name.rstrip(":"): value * 1024 for name, value in _table(MEMINFO).items()}
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        # Not Linux: free memory cannot be read without another package.
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None and limit < total:
        # The page cache counts as used but is reclaimed on demand; after a download it is most of what is used.
        used -= _table(CGROUP / "memory.stat").get("inactive_file", 0)
        return limit, min(free, max(0, limit - used))
    return total, free


def _table(path: Path) -> dict[str, int]:
    """Return name and number of every line of a kernel file; empty if there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """Return the number in a kernel file; None if there is no such file, or if it says that there is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _status(key: str) -> int:
    """Return the bytes that the kernel reports for this process under `key`; 0 if it reports none."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


class Meter:
    """Counts seconds, calls and peak bytes by phase."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self._lock = threading.Lock()
        self._phases: dict[str, PhaseUsage] = {}
        self._repeated: set[str] = set()
        self._beside: set[str] = set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time and memory of the block to phase `name`.

        On CUDA it synchronises at both ends, so the time is that of the device; finding the peak costs 0.1 ms on a CPU. For
        what runs thousands of times see `repeated`.
        """
        self._fold()
        self._repeated.clear()
        self._synchronise()
        self._reset()
        began = time.monotonic()
        try:
            with doing(name):
                yield
        finally:
            self._synchronise()
            self._add(name, time.monotonic() - began, self._peak())
            # What is held at most from here on belongs to the repeated phases.
            if self.cuda:
                self._fold()
                self._reset()

    @contextmanager
    def repeated(self, name: str) -> Iterator[None]:
        """Add the time of a block that runs thousands of times to phase `name`: nothing waits and nothing is reset.

        The time is the host's, as long as the device's wherever the block reads what the device made. On CUDA the peak is the
        largest number of bytes allocated since the phase before, read once, when the next one begins or `usage` is asked;
        elsewhere it is not measured.
        """
        began = time.monotonic()
        try:
            with doing(name):
                yield
        finally:
            self._add(name, time.monotonic() - began, 0)
            self._repeated.add(name)

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Add the time of a block on another thread, in phase `name` of its own, while the meter's thread is in any phase.

        Nothing waits and nothing is reset. The peak is that of the process while the block runs: what both threads hold.
        """
        with self._lock:
            self._phases.setdefault(name, PhaseUsage(0.0, 0, 0))
            self._beside.add(name)
        began = time.monotonic()
        try:
            with doing(name):
                yield
        finally:
            self._add(name, time.monotonic() - began, self._peak())
            with self._lock:
                self._beside.discard(name)

    def usage(self) -> dict[str, PhaseUsage]:
        """Return what was counted so far. Changes nothing, so another thread than the meter's may ask."""
        with self._lock:
            return self._phases | self._of_repeated()

    def _add(self, name: str, seconds: float, peak: int) -> None:
        with self._lock:
            before = self._phases.get(name, PhaseUsage(0.0, 0, 0))
            self._phases[name] = PhaseUsage(before.seconds + seconds, before.calls + 1, max(before.peak, peak))

    def _fold(self) -> None:
        """Give the peak since the last reset to whatever it belongs to besides a phase, before it is reset."""
        with self._lock:
            self._phases |= self._of_repeated()

    def _of_repeated(self) -> dict[str, PhaseUsage]:
        """Return what repeats or runs beside since the last reset, with its peak. Asking the allocator waits for nothing."""
        names = (*self._beside, *(self._repeated if self.cuda else ()))
        if not names:
            return {}
        held = self._peak()
        return {name: replace(self._phases[name], peak=max(self._phases[name].peak, held)) for name in names}

    def _synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            # Resets the kernel's high-water mark of this process (VmHWM).
            (PROC / "clear_refs").write_text("5")
        except OSError:
            return

    def _peak(self) -> int:
        if self.cuda:
            return int(torch.cuda.max_memory_allocated())
        return _status("VmHWM")

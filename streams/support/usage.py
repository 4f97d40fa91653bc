"""What an actor reports about its device, its time and its memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_COUNTED = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
"""Where Linux counts the processes that it ended for lack of memory: of the machine, and of the container."""


def oom_kills() -> int:
    """Return how many processes the kernel has ended for lack of memory here, as far as it says."""
    found = [0]
    for path in _COUNTED:
        with suppress(OSError, ValueError):
            found += [int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill ")]
    return max(found)


@dataclass(frozen=True)
class DeviceInfo:
    """The device that an actor runs on.

    Attributes:
        key: equal for all actors on the same device.
        name: the device in words, with its node.
        cuda: False for host memory.
        total: its memory in bytes.
        free: unallocated memory in bytes.
        held: bytes that this actor has allocated.
    """

    key: str
    name: str
    cuda: bool
    total: int
    free: int
    held: int = 0


@dataclass(frozen=True)
class PhaseUsage:
    """Cost of one kind of work of a process.

    Attributes:
        seconds: wall-clock time so far.
        calls: how often it ran.
        peak: largest number of bytes allocated on the device while it ran.
    """

    seconds: float
    calls: int
    peak: int


@dataclass(frozen=True)
class ProcessUsage:
    """Time and memory of an actor since its setup, by phase, and the number of kernels that it compiled."""

    process: str
    phases: dict[str, PhaseUsage]
    compiles: int = 0

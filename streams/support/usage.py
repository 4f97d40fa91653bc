"""Where an actor's time and memory went, as it reports them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceInfo:
    """What an actor computes on. key: equal for actors that share it. free: bytes that nobody holds at the moment; held:
    those that the actor itself does.
    """

    key: str
    name: str
    cuda: bool
    total: int
    free: int
    held: int = 0


@dataclass(frozen=True)
class PhaseUsage:
    """One kind of work of a process: seconds and calls so far; peak: most bytes held on the device at once meanwhile."""

    seconds: float
    calls: int
    peak: int


@dataclass(frozen=True)
class ProcessUsage:
    """Where the time and memory of an actor went since its setup. compiles: kernels compiled."""

    process: str
    phases: dict[str, PhaseUsage]
    compiles: int = 0

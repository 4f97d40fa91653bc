"""Times of calls on a device: medians after warm-up, by CUDA events there, by the clock elsewhere.

Invariants:
* the calls take turns, so that all see the same machine;
* what a call costs the first times (compiling, allocating) is not counted;
* on CUDA nothing waits between the calls of one measurement, so the time is the device's unless the host is slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

WARM_UP = 2
"""Calls of each before anything counts: the first compiles, the second finds the allocator's blocks."""
LEAST_MS = 1.0
"""Shortest measurement on CUDA: a call that takes less is repeated in one pair of events, or its launch would be timed."""
MOST_CALLS = 100
"""Calls of one measurement at most."""


def medians_ms(calls: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Return the median of `repeats` measurements of each call, in milliseconds. device: "cuda" or "cpu"."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: a median needs one measurement at least")
    timed = _by_events if device == "cuda" else _by_clock
    at_once = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        at_once[name] = calls_at_once(timed(call, 1)) if device == "cuda" else 1
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            took[name].append(timed(call, at_once[name]))
    return {name: median(values) for name, values in took.items()}


def calls_at_once(milliseconds: float) -> int:
    """Return how many calls of that length make one measurement on CUDA."""
    return max(1, min(MOST_CALLS, math.ceil(LEAST_MS / max(milliseconds, 1e-6))))


def _by_events(call: Callable[[], Any], count: int) -> float:
    """Return the milliseconds of one call, over `count` of them between two events of the current stream."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(count):
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / count


def _by_clock(call: Callable[[], Any], count: int) -> float:
    """Return the milliseconds of one call, over `count` of them on this machine's clock."""
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) * 1e3 / count

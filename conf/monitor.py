"""What a run watches itself for (Hydra key `monitor`): how often engine and learner are compared, when their mismatch stops
the run, and after how many steps without anything to learn it says so.

Invariant: limits that are not given are the bars that the exactness design sets for the run's dtypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SINGLE = (3e-4, 1e-5, math.inf)
HALF = (math.inf, 1e-2, 1e-4)
"""Largest difference, its mean, k3 divergence: in nats, with everything in float32, and with anything in less."""


@dataclass(frozen=True)
class Limits:
    """Of |behaviour - re-scored log-prob| and of k3, in nats; infinite = none."""

    max: float
    mean: float
    k3: float

    @property
    def token(self) -> float:
        """From which difference on a single token is named as off."""
        return self.max if math.isfinite(self.max) else 10 * self.mean


@dataclass(frozen=True)
class MonitorConfig:
    """every: each worker re-scores every N-th finished stream of one weight version on its own weights (0 = none).

    max, mean, k3: above it the run stops; null = by dtype (float32: 3e-4, 1e-5, none; less: none, 1e-2, 1e-4), 0 = no limit.
    tokens: how many are pooled before a mean or k3 is judged while training; the largest difference is judged at once.
    idle_steps: after so many RL steps in a row in which all streams of each group earned the same, the run says so (0 = never).
    """

    every: int = 16
    max: float | None = None
    mean: float | None = None
    k3: float | None = None
    tokens: int = 1000
    idle_steps: int = 5

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"monitor.every={self.every} must be a number of streams, 0 for none")
        if self.tokens < 1:
            raise ValueError(f"monitor.tokens={self.tokens} must be at least 1")
        if self.idle_steps < 0:
            raise ValueError(f"monitor.idle_steps={self.idle_steps} must be a number of steps, 0 for never")
        for key in ("max", "mean", "k3"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"monitor.{key}={value} must be null (by dtype), 0 (no limit) or a positive number")

    def limits(self, *dtypes: str) -> Limits:
        """Of a run whose models are of these dtypes."""
        bars = SINGLE if set(dtypes) == {"float32"} else HALF
        given = (self.max, self.mean, self.k3)
        return Limits(*(bar if value is None else value or math.inf for value, bar in zip(given, bars, strict=True)))

"""Typed settings of self-monitoring (Hydra key `monitor`): the mismatch of engine and learner, and idle steps.

Invariant: limits that are not set are those of the run's dtypes (SINGLE, HALF).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SINGLE = (3e-4, 1e-5, math.inf)
HALF = (math.inf, 1e-2, 1e-4)
"""Limits of the largest difference, its mean and k3, in nats: with everything in float32, and with anything in less."""


@dataclass(frozen=True)
class Limits:
    """Limits of |behaviour - re-scored log-prob| and of k3, in nats; infinite = none."""

    max: float
    mean: float
    k3: float

    @property
    def token(self) -> float:
        """Difference above which a single token is reported as an outlier, in nats."""
        return self.max if math.isfinite(self.max) else 10 * self.mean


@dataclass(frozen=True)
class MonitorConfig:
    """When the mismatch of engine and learner is measured and stops the run, and when idle steps are reported."""

    every: int = 16
    """Each worker re-scores every N-th stream that it finished with one weight version, on its own weights (0 =
    none).
    """
    max: float | None = None
    """Largest absolute difference of engine and learner log-prob of a single token, in nats, above which the run
    stops; null = by dtype (float32: 3e-4, less: no limit), 0 = no limit.
    """
    mean: float | None = None
    """Mean absolute difference of engine and learner log-probs, in nats, above which the run stops; null = by dtype
    (float32: 1e-5, less: 1e-2), 0 = no limit.
    """
    k3: float | None = None
    """k3 estimate of the KL of engine and learner, in nats, above which the run stops; null = by dtype (float32:
    no limit, less: 1e-4), 0 = no limit.
    """
    tokens: int = 1000
    """Tokens that are pooled while training before `monitor.mean` and `monitor.k3` are checked. `monitor.max` is
    checked at once.
    """
    idle_steps: int = 5
    """Successive RL steps in which every group's streams earned the same (nothing to learn) before the run warns
    (0 = never).
    """

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
        """Return the limits of a run whose models have these dtypes."""
        bars = SINGLE if set(dtypes) == {"float32"} else HALF
        given = (self.max, self.mean, self.k3)
        return Limits(*(bar if value is None else value or math.inf for value, bar in zip(given, bars, strict=True)))

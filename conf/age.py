"""The bound on the age of a sample that follows from the configuration; printed and checked before a buffer exists."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import RunConfig


@dataclass(frozen=True)
class AgeBound:
    """What bounds the age of a sample, in weight versions.

    Attributes:
        capacity: C, groups admitted and not yet trained.
        batch: B, groups per optimiser step.
        lag: versions that a worker may be behind.
    """

    capacity: int
    batch: int
    lag: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"algorithm.groups_per_step={self.batch} must be at least 1")
        if self.capacity < self.batch:
            raise ValueError(
                f"algorithm.groups_in_flight={self.capacity} must be at least algorithm.groups_per_step={self.batch}, "
                "or no step could ever be filled"
            )
        if self.lag < 0:
            raise ValueError(f"weights.max_lag={self.lag} must not be negative")

    @property
    def bound(self) -> int:
        """Largest age in versions: floor((C - 1) / B) + lag."""
        return (self.capacity - 1) // self.batch + self.lag


def age_bound(config: RunConfig) -> AgeBound:
    """Return the bound of a run. Raises ValueError for settings that could never fill a step.

    With `algorithm.mode=sync` a step's groups are admitted only when every worker runs its weights: C = B, lag 0.
    """
    algorithm = config.algorithm
    if algorithm.mode == "sync":
        return AgeBound(algorithm.groups_per_step, algorithm.groups_per_step, 0)
    return AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, config.weights.max_lag)

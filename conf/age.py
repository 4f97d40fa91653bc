"""How old a sample may get: the bound that follows from the configuration, printed and checked before a buffer exists."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import RunConfig


@dataclass(frozen=True)
class AgeBound:
    """capacity C: groups admitted and not yet trained. batch B: groups a step. lag: versions a worker may be behind."""

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
        return (self.capacity - 1) // self.batch + self.lag


def age_bound(config: RunConfig) -> AgeBound:
    """The bound of a run. `algorithm.mode=sync` admits a step's groups only when every worker runs its weights: C = B."""
    algorithm = config.algorithm
    if algorithm.mode == "sync":
        return AgeBound(algorithm.groups_per_step, algorithm.groups_per_step, 0)
    return AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, config.weights.max_lag)

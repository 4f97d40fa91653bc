"""Groups that teach nothing: whose advantages are all 0, as all of their streams did equally well, or badly.

`algorithm.zero_spread=resample` gives their places to the next groups (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2).

Invariants:
* at most `algorithm.resample_most` groups are given up between two optimiser steps; the next ones are trained as they are, so
  a policy that has learned all there is comes to its end;
* a group that is given up is counted by category and by length, and is never rolled out again by this stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from conf.training import AlgorithmConfig

SMALLEST = 1e-9
"""An advantage up to this is 0: rounding makes 1e-12 of rewards that are all 0.1."""


def teaches_nothing(advantages: Sequence[np.ndarray]) -> bool:
    """Return whether the advantages of a group are all 0. advantages: float64 [targets] of each stream."""
    return all(np.abs(values).max(initial=0.0) <= SMALLEST for values in advantages)


@dataclass
class GivenUp:
    """Groups that were given up since they taught nothing.

    Attributes:
        groups: how many. since_step: of them, since the last optimiser step.
        clip_seconds: their video's length.
        by_category, by_turns: how many of each category, and of each length, by doubling numbers of turns.
    """

    groups: int = 0
    since_step: int = 0
    clip_seconds: float = 0.0
    by_category: dict[str, int] = field(default_factory=dict)
    by_turns: dict[str, int] = field(default_factory=dict)

    def may_take(self, config: AlgorithmConfig) -> bool:
        """Return whether one more may be given up before the next step."""
        return config.zero_spread == "resample" and self.since_step < config.resample_most

    def add(self, category: str, turns: int, clip_seconds: float) -> None:
        """Count a group that is given up."""
        self.groups += 1
        self.since_step += 1
        self.clip_seconds += clip_seconds
        low = 1 << (max(turns, 1).bit_length() - 1)
        for counts, name in ((self.by_category, category), (self.by_turns, f"{low}-{2 * low - 1}")):
            counts[name] = counts.get(name, 0) + 1

    @property
    def in_words(self) -> str:
        """What was given up, for the end of a stage."""
        shares = [
            ", ".join(f"{name} {count}" for name, count in sorted(c.items())) for c in (self.by_category, self.by_turns)
        ]
        return (
            f"{self.groups} groups ({self.clip_seconds:.0f} s of video) were given up, as all their streams did equally well: "
            f"by category {shares[0]}; by turns {shares[1]}"
        )

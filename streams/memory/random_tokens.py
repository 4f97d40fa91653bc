"""random: any token may be evicted at any turn. For tests: the learner must score exactly, whatever is evicted.

Invariant: the draws depend on the seed, the turn and the token's log index, on nothing else.
"""

from __future__ import annotations

import numpy as np

from streams.memory.policy import LiveTokens, MemoryPolicy, TurnStart


class RandomTokens(MemoryPolicy):
    """At every turn each live token, of any kind, is evicted with probability `rate`."""

    def __init__(self, seed: int, rate: float) -> None:
        self.seed, self.rate = seed, rate

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        if not len(live):
            return np.zeros(0, bool)
        draws = np.random.default_rng([self.seed, start.turn]).random(int(live.index[-1]) + 1)
        return draws[live.index] < self.rate

    @property
    def words(self) -> str:
        return f"each token with probability {1 - self.rate:g} at every turn (seed {self.seed})"

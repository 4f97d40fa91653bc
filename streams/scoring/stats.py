"""Mismatch statistics: behaviour against re-scored log-probs, with their token counts.

Owner: streams.scoring. Invariant: an empty sample is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LogpDiff:
    """|behaviour - re-scored| log-prob over `tokens` tokens; mean, max and k3 are None where there was no token.

    k3: mean of exp(d) - 1 - d with d = re-scored - behaviour, an estimate of the KL divergence of the engine's
    distribution from the learner's (Schulman's k3), in nats.
    """

    tokens: int = 0
    mean: float | None = None
    max: float | None = None
    k3: float | None = None

    @classmethod
    def of(cls, differences: np.ndarray) -> LogpDiff:
        """differences: float [tokens], re-scored minus behaviour, signed."""
        if not len(differences):
            return cls()
        size = np.abs(differences)
        # A difference that overflows makes the estimate infinite, which says enough.
        with np.errstate(over="ignore", invalid="ignore"):
            k3 = np.expm1(differences) - differences
        return cls(len(size), float(size.mean()), float(size.max()), float(k3.mean()))

    @classmethod
    def merge(cls, parts: list[LogpDiff]) -> LogpDiff:
        full = [part for part in parts if part.tokens]
        tokens = sum(part.tokens for part in full)
        if not tokens:
            return cls()

        def mean(values: list[float | None]) -> float | None:
            # Of a part from before k3 was kept, nothing is known.
            if any(value is None for value in values):
                return None
            return sum(part.tokens * (value or 0.0) for part, value in zip(full, values, strict=True)) / tokens

        # numpy's maximum: Python's loses a NaN that comes second.
        largest = float(np.max([p.max or 0.0 for p in full]))
        return cls(tokens, mean([p.mean for p in full]), largest, mean([p.k3 for p in full]))

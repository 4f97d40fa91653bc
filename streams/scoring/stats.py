"""Mismatch statistics: behaviour against re-scored log-probs, with their token counts.

Owner: streams.scoring. Invariant: an empty sample is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LogpDiff:
    """|behaviour - re-scored| log-prob over `tokens` tokens; mean and max are None where there was no token."""

    tokens: int = 0
    mean: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, differences: np.ndarray) -> LogpDiff:
        if not len(differences):
            return cls()
        return cls(len(differences), float(differences.mean()), float(differences.max()))

    @classmethod
    def merge(cls, parts: list[LogpDiff]) -> LogpDiff:
        full = [part for part in parts if part.tokens]
        tokens = sum(part.tokens for part in full)
        if not tokens:
            return cls()
        mean = sum(part.tokens * (part.mean or 0.0) for part in full) / tokens
        return cls(tokens, mean, max(part.max or 0.0 for part in full))

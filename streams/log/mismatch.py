"""Statistics of the mismatch between behaviour and re-scored log-probs, and the token that shows it best.

Invariant: an empty sample is None, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streams.log.record import Kind, StreamLog


@dataclass(frozen=True)
class LogpDiff:
    """Statistics of |behaviour - re-scored| log-prob over `tokens` tokens; mean, max and k3 are None if there is no token.

    k3: mean of exp(d) - 1 - d with d = re-scored - behaviour, an estimate of the KL divergence of the engine's
    distribution from the learner's (Schulman's k3), in nats.
    """

    tokens: int = 0
    mean: float | None = None
    max: float | None = None
    k3: float | None = None

    @classmethod
    def of(cls, differences: np.ndarray) -> LogpDiff:
        """Return the statistics of differences float [tokens], re-scored minus behaviour, signed."""
        if not len(differences):
            return cls()
        size = np.abs(differences)
        # float64: in float32 a finite difference above 88 would make the estimate infinite, and that stops a run whatever
        # its limits. Nothing is bounded here: what is reported is the difference as it is.
        differences = differences.astype(np.float64)
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
            # A part from before k3 was recorded has none: then there is none for all.
            if any(value is None for value in values):
                return None
            return sum(part.tokens * (value or 0.0) for part, value in zip(full, values, strict=True)) / tokens

        # numpy's maximum: Python's loses a NaN that comes second.
        largest = float(np.max([p.max or 0.0 for p in full]))
        return cls(tokens, mean([p.mean for p in full]), largest, mean([p.k3 for p in full]))


@dataclass(frozen=True)
class OffToken:
    """A sampled token whose log-probs differ. above: it is the first of its stream beyond a limit; else the furthest off.

    kind: in lower case. policy: as LogHeader.memory. index: in the stream's log.
    """

    stream: str
    policy: str
    kind: str
    turn: int
    index: int
    id: int
    version: int
    behaviour: float
    rescored: float
    above: bool

    @classmethod
    def of(cls, log: StreamLog, index: np.ndarray, differences: np.ndarray, limit: float) -> OffToken | None:
        """Return the first token beyond `limit`, or else the one with the largest difference; None if N is 0.

        index: int [N], log indices, ascending. differences: float [N], re-scored minus behaviour.
        """
        if not len(index):
            return None
        # Written so that NaN is beyond every limit.
        beyond = np.flatnonzero(~(np.abs(differences) <= limit))
        at = int(beyond[0]) if len(beyond) else int(np.abs(differences).argmax())
        token = int(index[at])
        behaviour = float(log.behaviour_logp[token])
        return cls(
            stream=log.header.stream_id,
            policy=log.header.memory,
            kind=Kind(int(log.kind[token])).name.lower(),
            turn=int(log.turn[token]),
            index=token,
            id=int(log.ids[token]),
            version=int(log.version[token]),
            behaviour=behaviour,
            rescored=behaviour + float(differences[at]),
            above=bool(len(beyond)),
        )


def most_telling(tokens: Sequence[OffToken | None]) -> OffToken | None:
    """Return the first of the tokens beyond their limit, or else the one with the largest difference; None without any."""
    found = [token for token in tokens if token is not None]
    beyond = [token for token in found if token.above]
    return beyond[0] if beyond else max(found, key=lambda t: abs(t.rescored - t.behaviour), default=None)

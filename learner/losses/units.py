"""Streams and turns of a micro-batch's targets: what a loss averages over.

Invariants:
- A stream is never cut (`learner.batching`), so its targets, and those of each of its turns, are counted whole.
- Counts are those of all targets, before anything is masked: a token that is left out does not make the others weigh more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Units:
    """Which unit each of N targets belongs to.

    Attributes:
        of: int64 [N], the unit's number, from 0.
        counts: int64 [U], the targets of each unit.
    """

    of: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def by(cls, *labels: np.ndarray) -> Units:
        """Return the units of targets that have all labels alike. labels: int [N] each, none negative."""
        # One number for all labels: numpy sorts columns of several many times as slowly.
        label = np.zeros(len(labels[0]), np.int64)
        for more in labels:
            label = label * (int(more.max(initial=0)) + 1) + more
        _, of, counts = np.unique(label, return_inverse=True, return_counts=True)
        return cls(torch.from_numpy(of), torch.from_numpy(counts))

    def size(self, like: torch.Tensor) -> torch.Tensor:
        """Return how many targets the unit of each has, [N], in the dtype and on the device of `like`."""
        return self.counts[self.of].to(like)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each target the mean of values [N] over its unit, [N]."""
        of = self.of.to(values.device)
        return values.new_zeros(len(self.counts)).index_add_(0, of, values)[of] / self.size(values)

    def to_go(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each target the sum of values [N] from it to the last of its unit, [N]; targets are in order."""
        order = self.of.argsort(stable=True)
        # Sums from the end over all units, less what lies behind the target's own.
        behind = values[order].flip(0).cumsum(0).flip(0)
        ends = self.counts.cumsum(0)
        after = torch.cat([behind, behind.new_zeros(1)])[ends]
        to_go = torch.empty_like(values)
        to_go[order] = behind - after[self.of[order]]
        return to_go


@dataclass(frozen=True)
class BatchUnits:
    """The streams and the turns of a micro-batch's targets."""

    stream: Units
    turn: Units

    @classmethod
    def of(cls, stream: np.ndarray, turn: np.ndarray) -> BatchUnits:
        """stream, turn: int [N], of each target; turns are numbered within their stream."""
        return cls(Units.by(stream), Units.by(stream, turn))

    def named(self, name: str) -> Units:
        """name: `stream` or `turn`."""
        return self.stream if name == "stream" else self.turn

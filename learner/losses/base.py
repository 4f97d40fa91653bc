"""What the engine asks of a loss, and what a loss returns.

Invariants:
- A loss is a sum over the micro-batch divided by the whole step's normaliser, so the gradient of a step depends neither
  on how it was cut into micro-batches nor on the number of ranks.
- Metrics are sums over the micro-batch's targets; the engine divides them by the step's targets.
- A loss is made from the totals of all ranks, and does not change after that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch

from learner.batching import MicroBatch, RankWork
from learner.losses.config import LossConfig
from streams.backbone.boundary import Boundary
from streams.layout.layout import LayoutTokens
from streams.log.record import Kind, StreamLog

Sums = dict[str, torch.Tensor]
"""Metrics of a micro-batch by name: scalar sums over its targets, without gradient."""

C = TypeVar("C", bound=LossConfig)


@dataclass(frozen=True)
class TargetCounts:
    """Numbers of target tokens, and of those that the cold start weights differently.

    Attributes:
        targets: All targets.
        silent, spoken: Decision tokens, by their decision.
        answer: Words of answers.
        turns, streams: Those that have a target.
    """

    targets: int = 0
    silent: int = 0
    spoken: int = 0
    answer: int = 0
    turns: int = 0
    streams: int = 0

    @classmethod
    def of(cls, logs: list[StreamLog], tokens: LayoutTokens) -> TargetCounts:
        """Count the targets of logs."""
        counts = [0] * 6
        for log in logs:
            ids, kind = log.ids[log.target], log.kind[log.target]
            decision = kind == Kind.DECISION
            found = (
                np.ones_like(decision),
                decision & (ids == tokens.silent),
                decision & (ids == tokens.response),
                kind == Kind.RESPONSE,
            )
            sums = [*(int(mask.sum()) for mask in found), len(np.unique(log.turn[log.target])), int(len(ids) > 0)]
            counts = [total + more for total, more in zip(counts, sums, strict=True)]
        return cls(*counts)

    def __add__(self, other: TargetCounts) -> TargetCounts:
        return TargetCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class LossValue:
    """The loss of one micro-batch of N targets.

    Attributes:
        value: Scalar with gradient, already divided by the step's normaliser.
        sums: Metrics, see Sums.
        differences: float64 [N], by which outliers are found: log-prob minus behaviour log-prob if targets are sampled,
            else the log-prob itself. Infinite at a target that makes the loss not finite.
    """

    value: torch.Tensor
    sums: Sums
    differences: np.ndarray


class Loss(ABC, Generic[C]):
    """The loss of one optimiser step."""

    sampled: ClassVar[bool]
    """Whether targets were sampled by the policy. If so, `differences` at its own version are 0 but for rounding."""

    def __init__(self, config: C, totals: TargetCounts, tokens: LayoutTokens) -> None:
        """Make the loss of one step. totals: targets of all ranks. tokens: ids of the layout's special tokens."""
        self.config, self.normaliser = config, float(totals.targets)

    @property
    def needs_reference(self) -> bool:
        """Whether `__call__` needs the frozen reference's log-probs."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether `__call__` needs entropies with gradient."""
        return False

    @staticmethod
    def problem(config: C, work: RankWork, *, has_reference: bool, boundary: Boundary) -> str | None:
        """Return why this rank's work cannot be trained on with that config; None if it can."""
        return None

    @abstractmethod
    def __call__(
        self, logp: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, reference: torch.Tensor | None
    ) -> LossValue:
        """Return the loss of the batch's targets.

        logp: log-probs [N] with gradient. entropy: [N] in nats, with gradient if `needs_entropy`. reference: log-probs [N]
        without gradient; None unless `needs_reference`.
        """


def or_infinite(values: np.ndarray) -> np.ndarray:
    """Return the values, infinite where they are not finite: NaN would never compare as the largest."""
    return np.where(np.isfinite(values), values, np.inf)

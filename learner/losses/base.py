"""What the engine asks of a loss, and what a loss returns.

Invariants:
- A loss is a sum over this micro-batch divided by the whole step's normaliser: the gradient of a step does not depend on
  how it was cut into micro-batches, nor on the number of ranks.
- Metrics are sums over the micro-batch's targets; the engine divides them by the step's targets.
- A loss knows the totals of all ranks when it is made, and does not change after that.
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
    """Target tokens of a step, and those that the cold start weighs apart: both decisions, words of answers."""

    targets: int = 0
    silent: int = 0
    spoken: int = 0
    answer: int = 0

    @classmethod
    def of(cls, logs: list[StreamLog], tokens: LayoutTokens) -> TargetCounts:
        counts = [0, 0, 0, 0]
        for log in logs:
            ids, kind = log.ids[log.target], log.kind[log.target]
            decision = kind == Kind.DECISION
            found = (
                np.ones_like(decision),
                decision & (ids == tokens.silent),
                decision & (ids == tokens.response),
                kind == Kind.RESPONSE,
            )
            counts = [total + int(mask.sum()) for total, mask in zip(counts, found, strict=True)]
        return cls(*counts)

    def __add__(self, other: TargetCounts) -> TargetCounts:
        return TargetCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class LossValue:
    """What a loss makes of one micro-batch of N targets.

    Attributes:
        value: Scalar with gradient, already divided by the step's normaliser.
        sums: Metrics, see Sums.
        differences: float64 [N], by which an outlier is found: log-prob minus behaviour log-prob where the targets were
            sampled, the log-prob itself where not; infinite at a target that makes the loss not finite.
    """

    value: torch.Tensor
    sums: Sums
    differences: np.ndarray


class Loss(ABC, Generic[C]):
    """The loss of one optimiser step."""

    sampled: ClassVar[bool]
    """Whether the targets were sampled by the policy: then `differences` at its own version must vanish."""

    def __init__(self, config: C, totals: TargetCounts, tokens: LayoutTokens) -> None:
        """totals: of all ranks. tokens: ids of the layout's special tokens."""
        self.config, self.normaliser = config, float(totals.targets)

    @property
    def needs_reference(self) -> bool:
        """Whether `__call__` is to be given the frozen reference's log-probs."""
        return False

    @staticmethod
    def problem(config: C, work: RankWork, *, has_reference: bool, boundary: Boundary) -> str | None:
        """Why this rank's work cannot be trained on with that config, or None."""
        return None

    @abstractmethod
    def __call__(self, logp: torch.Tensor, batch: MicroBatch, reference: torch.Tensor | None) -> LossValue:
        """Loss of the batch's targets. logp [N], with gradient; reference [N], without, if `needs_reference`."""


def or_infinite(values: np.ndarray) -> np.ndarray:
    """The values, infinite where they are not finite: NaN would compare as smaller than any."""
    return np.where(np.isfinite(values), values, np.inf)

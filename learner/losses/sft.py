"""The cold start's loss: cross-entropy over demonstrated tokens, with the two decisions balanced.

Invariants:
- The weights depend on the totals of the whole step, so they are the same in every micro-batch and on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from learner.batching import MicroBatch
from learner.losses.base import Loss, LossValue, Sums, TargetCounts, or_infinite
from learner.losses.config import SupervisedConfig
from streams.layout.layout import LayoutTokens
from streams.log.record import Kind


def sft_loss(logp: torch.Tensor, weight: torch.Tensor, *, normaliser: float) -> tuple[torch.Tensor, Sums]:
    """Return the weighted cross-entropy -sum(weight * logp) / normaliser, and metrics. logp, weight: [N]."""
    with torch.no_grad():
        sums = {"nll": -logp.sum()}
    return -(weight * logp).sum() / normaliser, sums


def decision_weights(silent: int, spoken: int, clamp: float) -> tuple[float, float]:
    """Return the weights of <silent> and <response> that balance both decisions of a step: N / (2 n), clamped above.

    silent, spoken: how often each is decided in the step (n); N is their sum. A decision that does not occur weighs 1.
    Source: ThinkStream (arXiv 2603.12938), cold-start loss.
    """
    total = silent + spoken
    return (
        min(total / (2 * silent), clamp) if silent else 1.0,
        min(total / (2 * spoken), clamp) if spoken else 1.0,
    )


@dataclass(frozen=True)
class SftWeights:
    """Weights of the two decision tokens and of the words of an answer; every other target weighs 1."""

    silent_id: int
    response_id: int
    silent: float
    spoken: float
    answer: float

    @classmethod
    def balanced(cls, counts: TargetCounts, tokens: LayoutTokens, config: SupervisedConfig) -> SftWeights:
        """Return the weights of a step. counts: targets of all its logs, on all ranks."""
        silent, spoken = 1.0, 1.0
        if config.balance_decisions:
            silent, spoken = decision_weights(counts.silent, counts.spoken, config.decision_weight_clamp)
        return cls(tokens.silent, tokens.response, silent, spoken, config.answer_weight)

    def of(self, ids: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """Return the weights of targets, float64 [N], from their ids and kinds [N]."""
        weight = np.where(kind == Kind.RESPONSE, self.answer, 1.0)
        decision = kind == Kind.DECISION
        weight[decision & (ids == self.silent_id)] = self.silent
        weight[decision & (ids == self.response_id)] = self.spoken
        return weight

    def total(self, counts: TargetCounts) -> float:
        """Return the sum of the weights of all targets of a step: the normaliser of its mean."""
        plain = counts.targets - counts.silent - counts.spoken - counts.answer
        return plain + self.silent * counts.silent + self.spoken * counts.spoken + self.answer * counts.answer


class Supervised(Loss[SupervisedConfig]):
    """`sft_loss` over the demonstrated tokens of a step, weighted mean."""

    sampled = False

    def __init__(self, config: SupervisedConfig, totals: TargetCounts, tokens: LayoutTokens) -> None:
        super().__init__(config, totals, tokens)
        self.weights = SftWeights.balanced(totals, tokens, config)
        self.normaliser = self.weights.total(totals)

    def __call__(
        self, logp: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, reference: torch.Tensor | None
    ) -> LossValue:
        weight = self.weights.of(batch.rows.target_ids.numpy(), batch.column("kind"))
        value, sums = sft_loss(logp, torch.from_numpy(weight).to(logp), normaliser=self.normaliser)
        return LossValue(value, sums, or_infinite(logp.detach().double().cpu().numpy()))

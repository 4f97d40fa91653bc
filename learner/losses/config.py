"""Settings of the losses: what a TrainBatch carries, and what the driver knows of a loss.

Invariants:
- Importing this module loads no torch.
- A config is a frozen value; one that cannot work is refused when it is made, by the key that it comes from.
- `learner.losses.table` knows the loss of every config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """Base of all settings of losses. The type names the loss, the fields are its settings."""


@dataclass(frozen=True)
class PolicyGradientConfig(LossConfig):
    """Settings of the clipped policy gradient (GRPO and its kin).

    Attributes:
        clip_low: How far below 1 the ratio still counts; in (0, 1).
        clip_high: How far above 1 it does; above 0.
        kl_coef: Weight of the KL to the frozen reference; 0 = none is computed.
    """

    clip_low: float
    clip_high: float
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and 0 < self.clip_high < math.inf):
            raise ValueError(
                f"algorithm.clip_low={self.clip_low} must lie in (0, 1), algorithm.clip_high={self.clip_high} above 0"
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"algorithm.kl_coef={self.kl_coef} must be 0 or a positive number")


@dataclass(frozen=True)
class SupervisedConfig(LossConfig):
    """Settings of the cold start's weighted cross-entropy.

    Attributes:
        balance_decisions: Weigh silence and speech so that both decisions have the same mass in a step.
        decision_weight_clamp: Largest weight of a decision token.
        answer_weight: Weight of the words of an answer.
    """

    balance_decisions: bool
    decision_weight_clamp: float
    answer_weight: float

    def __post_init__(self) -> None:
        if not (0 < self.decision_weight_clamp < math.inf and 0 < self.answer_weight < math.inf):
            raise ValueError(
                f"sft.decision_weight_clamp={self.decision_weight_clamp} and sft.answer_weight={self.answer_weight} "
                "must be positive numbers"
            )

"""Settings of the losses: what a TrainBatch carries, and all that the driver knows about a loss.

Invariants:
- Importing this module loads no torch.
- A config is a frozen value. One that cannot work raises ValueError when it is made, with the config key it comes from.
- `learner.losses.table` has the loss of every config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """Base class of the settings of a loss. The type determines the loss, the fields are its settings."""


@dataclass(frozen=True)
class PolicyGradientConfig(LossConfig):
    """Settings of the clipped policy gradient (GRPO and its kin).

    Attributes:
        clip_low: The ratio is clipped below 1 - clip_low; in (0, 1).
        clip_high: The ratio is clipped above 1 + clip_high; above 0.
        kl_coef: Weight of the KL to the frozen reference; 0 = no KL is computed.
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
        balance_decisions: Weight silence and speech so that both decisions have the same total weight in a step.
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

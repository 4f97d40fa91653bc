"""GRPO and Dr. GRPO: a stream's reward against its group's mean, with the clipped policy gradient.

They differ in one thing: GRPO divides by the group's standard deviation (arXiv 2402.03300), and Dr. GRPO does not
(arXiv 2503.20783). The division gives more weight to groups that are nearly always right, or nearly always wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conf.training import AlgorithmConfig
from learner.losses.config import PolicyGradientConfig
from rl.algorithms.advantages import centred, normalised
from rl.algorithms.base import even_advantages
from rl.results import ReadyGroup


@dataclass(frozen=True)
class Grpo:
    """Rewards centred and normalised within their group."""

    config: AlgorithmConfig

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, normalised)

    @property
    def loss(self) -> PolicyGradientConfig:
        return PolicyGradientConfig(self.config.clip_low, self.config.clip_high, self.config.kl_coef)


@dataclass(frozen=True)
class DrGrpo(Grpo):
    """Rewards centred within their group."""

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, centred)

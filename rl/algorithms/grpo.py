"""GRPO, Dr. GRPO and RLOO: a stream's reward against its group's, with the configured policy gradient.

They differ in one thing: GRPO divides by the group's standard deviation (arXiv 2402.03300), Dr. GRPO does not (arXiv
2503.20783), and RLOO compares with the mean of the others (arXiv 2402.14740). The division gives more weight to groups that
are nearly always right, or nearly always wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.training import AlgorithmConfig
from learner.losses.config import PolicyGradientConfig
from rl.algorithms.advantages import centred, leave_one_out, normalised
from rl.algorithms.base import even_advantages
from rl.results import ReadyGroup


@dataclass(frozen=True)
class Grpo:
    """Rewards centred and normalised within their group."""

    config: AlgorithmConfig

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, normalised)

    def over_batch(
        self, groups: Sequence[ReadyGroup], advantages: list[tuple[np.ndarray, ...]]
    ) -> list[tuple[np.ndarray, ...]]:
        return advantages

    @property
    def loss(self) -> PolicyGradientConfig:
        return self.config.loss


@dataclass(frozen=True)
class DrGrpo(Grpo):
    """Rewards centred within their group."""

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, centred)


@dataclass(frozen=True)
class Rloo(Grpo):
    """Rewards less the mean of the others of their group."""

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, leave_one_out)

"""REINFORCE++: rewards against the whole batch, and its variant with a baseline by group (arXiv 2501.03262).

Invariants:
* no value is learned and, without the baseline, a group may be one stream: what a stream is compared with is the batch;
* a stream whose reward failed has advantage 0, and no part in the batch's mean and spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.training import AlgorithmConfig
from learner.losses.config import PolicyGradientConfig
from rl.algorithms.advantages import centred, whitened
from rl.algorithms.base import even_advantages
from rl.results import ReadyGroup


@dataclass(frozen=True)
class ReinforcePP:
    """Rewards, whitened over the tokens of a batch. The return of every token is its stream's reward: nothing is discounted."""

    config: AlgorithmConfig

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, np.copy, fewest=1)

    def over_batch(
        self, groups: Sequence[ReadyGroup], advantages: list[tuple[np.ndarray, ...]]
    ) -> list[tuple[np.ndarray, ...]]:
        counted = [
            (g, s) for g, group in enumerate(groups) for s, result in enumerate(group.results) if result.failed is None
        ]
        made = [list(of_group) for of_group in advantages]
        for (g, s), values in zip(counted, whitened([advantages[g][s] for g, s in counted]), strict=True):
            made[g][s] = values
        return [tuple(of_group) for of_group in made]

    @property
    def loss(self) -> PolicyGradientConfig:
        return self.config.loss


@dataclass(frozen=True)
class ReinforcePPBaseline(ReinforcePP):
    """Rewards centred within their group, then whitened over the tokens of a batch."""

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        return even_advantages(group, centred)

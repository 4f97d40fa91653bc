"""What an algorithm is: advantages of a scored group, token by token, and the loss that uses them.

Invariants:
* an algorithm sees only the light half of a group (GroupSummary and rewards): the driver never loads a log;
* a stream whose reward failed has advantage 0 and does not count in its group's baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from learner.losses.config import LossConfig
from learner.messages import Runs, TrainBatch, TrainGroup
from rl.results import ReadyGroup


class Algorithm(Protocol):
    """One algorithm with its settings, without state between steps."""

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        """Return one float64 array per stream of the group, with one value per target token in the log's order.

        `group.summary.targets[stream][turn]` is the number of targets of a turn. A stream's targets are those of turn
        0, then those of turn 1, and so on, so `np.repeat(by_turn, targets[stream])` gives all targets of a turn that
        turn's value.
        """

    def over_batch(
        self, groups: Sequence[ReadyGroup], advantages: list[tuple[np.ndarray, ...]]
    ) -> list[tuple[np.ndarray, ...]]:
        """Return the advantages of a step's groups as they are trained on, from those that each has by itself."""

    @property
    def loss(self) -> LossConfig:
        """The settings of the loss, whose type also says which loss it is."""


def even_advantages(
    group: ReadyGroup, of_rewards: Callable[[np.ndarray], np.ndarray], *, fewest: int = 2
) -> tuple[np.ndarray, ...]:
    """Return the advantages of an algorithm that judges whole streams: all targets of a stream get the stream's.

    of_rewards: advantages float64 [S] from the rewards [S] of the streams whose reward did not fail. It is not called
    for fewer than `fewest` of them: one alone has nothing in its group to be compared with.
    """
    scored = [i for i, result in enumerate(group.results) if result.failed is None]
    advantages = np.zeros(len(group.results))
    if len(scored) >= fewest:
        advantages[scored] = of_rewards(np.array([group.results[i].total for i in scored]))
    return tuple(
        np.full(sum(by_turn), advantage) for advantage, by_turn in zip(advantages, group.summary.targets, strict=True)
    )


def train_batch(step: int, algorithm: Algorithm, groups: Sequence[ReadyGroup]) -> TrainBatch:
    """Return the batch of optimiser step `step` over scored groups."""
    advantages = algorithm.over_batch(groups, [algorithm.advantages(group) for group in groups])
    return TrainBatch(
        step=step,
        loss=algorithm.loss,
        groups=tuple(
            TrainGroup(
                group=group.summary.group,
                payload=group.payload,
                advantages=tuple(Runs.of(values) for values in of_group),
                tokens=group.summary.log_tokens,
            )
            for group, of_group in zip(groups, advantages, strict=True)
        ),
    )

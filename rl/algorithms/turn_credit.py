"""Credit per turn: what a stream's answers are worth goes to the turns that gave them. docs/credit.md derives it.

All streams of a group see the same chunk at the same turn, so the streams in which an answer is still to come at that turn are
samples of one state, and the mean of what that answer was worth to them is a baseline for it.

Invariants:
* the turns of a group's streams are as many as each other's: a baseline by turn would be biased if a stream could end early;
* the advantages of an answer sum to 0 over the streams in which it is pending;
* a stream whose reward failed has advantage 0 and is in no baseline;
* without an answer in any stream before turn t, the TD form gives turns before t nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.training import AlgorithmConfig
from learner.losses.config import PolicyGradientConfig
from rl.algorithms.base import Algorithm
from rl.results import ReadyGroup


def factored(values: np.ndarray, answered: np.ndarray, turns: int, form: str) -> np.ndarray:
    """Return the advantages of one answer, float64 [S, turns].

    Args:
        values: float64 [S], what the answer was worth to each stream, as a part of its reward.
        answered: int [S], the turn that gave it; the last one where none did.
        form: `td` = what the turn changed: the value it gave, or what the answer is worth to those that go on, less what it
            was worth before. `return` = the value less that baseline, in every turn up to the answer's.

    With V(t) the mean value over streams that have not answered before t: td is (v if the answer is given at t, else V(t + 1))
    - V(t), return is v - V(t). Both are 0 after the answer's turn.
    """
    at = np.arange(turns)
    pending = answered[:, None] >= at
    count = pending.sum(0)
    worth = np.where(count > 0, (values[:, None] * pending).sum(0) / np.maximum(count, 1), 0.0)
    if form == "return":
        return np.where(pending, values[:, None] - worth, 0.0)
    after = np.append(worth[1:], 0.0)
    reached = np.where(answered[:, None] == at, values[:, None], after)
    return np.where(pending, reached - worth, 0.0)


def turn_advantages(group: ReadyGroup, form: str) -> np.ndarray:
    """Return the advantages of a group by turn, float64 [S, turns]: the sum over its expected answers.

    Raises ValueError if its streams differ in their number of turns.
    """
    lengths = {len(by_turn) for by_turn in group.summary.targets}
    if len(lengths) != 1:
        raise ValueError(
            f"group {group.summary.group}: streams of {min(lengths)} to {max(lengths)} turns; algorithm.credit=turn compares "
            "turn by turn, so all streams of a group must have as many: use algorithm.credit=stream"
        )
    turns = lengths.pop()
    found = np.zeros((len(group.results), turns))
    scored = [i for i, result in enumerate(group.results) if result.failed is None]
    if len(scored) < 2 or not turns:
        return found
    answers = len(group.results[scored[0]].answers)
    for k in range(answers):
        given = [group.results[i].answers[k] for i in scored]
        values = np.array([answer.value for answer in given]) / answers
        last = turns - 1
        answered = np.array([last if a.response_turn is None else min(a.response_turn, last) for a in given])
        found[scored] += factored(values, answered, turns, form)
    return found


@dataclass(frozen=True)
class TurnCredit:
    """`algorithm.turn_weight` of credit by turn, and the rest of `stream`'s."""

    config: AlgorithmConfig
    stream: Algorithm

    def advantages(self, group: ReadyGroup) -> tuple[np.ndarray, ...]:
        weight = self.config.turn_weight
        by_turn = turn_advantages(group, self.config.turn_form)
        return tuple(
            (1.0 - weight) * whole + weight * np.repeat(turns, targets)
            for whole, turns, targets in zip(self.stream.advantages(group), by_turn, group.summary.targets, strict=True)
        )

    def over_batch(
        self, groups: Sequence[ReadyGroup], advantages: list[tuple[np.ndarray, ...]]
    ) -> list[tuple[np.ndarray, ...]]:
        return self.stream.over_batch(groups, advantages)

    @property
    def loss(self) -> PolicyGradientConfig:
        return self.config.loss

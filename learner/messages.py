"""What the driver sends to the learner's ranks for an optimiser step. (What comes back is in `streams.messages`.)

Invariants:
- Importing this module loads no torch.
- A message is a value: nobody changes it after sending.
- Logs and media travel by object reference. The only per-token data that the driver sends are advantages, in runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.losses.config import LossConfig


class RankDiedError(RuntimeError):
    """The process of a learner rank died while the others worked on; the message names it, and Ray's cause."""


@dataclass(frozen=True)
class Runs:
    """A float64 array as runs of equal values: one run if a stream has one advantage, one per turn if its turns have.

    Attributes:
        values: float64 [R].
        lengths: int64 [R], how often each value is repeated.
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, array: np.ndarray) -> Runs:
        """Encode float64 [T]. Equal means equal to the last bit, so `expand` returns the same array."""
        array = np.ascontiguousarray(array, dtype=np.float64)
        bits = array.view(np.int64)
        starts = np.flatnonzero(np.r_[True, bits[1:] != bits[:-1]]) if len(array) else np.zeros(0, np.int64)
        return cls(array[starts], np.diff(np.r_[starts, len(array)]))

    def expand(self) -> np.ndarray:
        """Return the array that was encoded, float64 [T]."""
        return np.repeat(self.values, self.lengths)


@dataclass(frozen=True)
class TrainGroup:
    """One group as the learner trains it.

    Attributes:
        group: Its id.
        payload: GroupPayload or object reference to one.
        advantages: One entry per stream, with one value per target token in the order of its log; empty in the cold start.
        tokens: Tokens of all its logs (GroupSummary.log_tokens), by which groups are shared out over the ranks.
    """

    group: str
    payload: Any
    advantages: tuple[Runs, ...] = ()
    tokens: int = 0


@dataclass(frozen=True)
class TrainBatch:
    """One optimiser step.

    Attributes:
        step: Its index, from 0.
        loss: Which loss, and its settings.
        groups: The groups to train on.
        publish: Whether to export the new weights after the step.
    """

    step: int
    loss: LossConfig
    groups: tuple[TrainGroup, ...]
    publish: bool = True

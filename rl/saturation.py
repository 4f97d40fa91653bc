"""Ends an RL stage once its reward is as high as asked for (`algorithm.stop_when`).

Pure. It reads the metrics that the journal has of every step, so a resumed stage comes to the same end.

Invariants:
* a stage ends with the first step at which the mean reward of `algorithm.stop_steps` steps in a row is high enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from conf.training import AlgorithmConfig
from rl.idle import Values
from rl.metrics import TOTAL


class Saturation:
    """Sees the steps of a stage, in order. `reached`: the mean reward with which the stage ends; None before."""

    def __init__(self, config: AlgorithmConfig, before: Iterable[Values] = ()) -> None:
        """before: the metrics of the stage's earlier steps, in order."""
        self._config = config
        self._rewards: deque[float] = deque(maxlen=config.stop_steps)
        self.reached: float | None = None
        for values in before:
            self.see(values)

    def see(self, values: Values) -> None:
        """Count a step."""
        if (reward := values.get(TOTAL)) is None:
            return
        self._rewards.append(reward)
        mean = sum(self._rewards) / len(self._rewards)
        if len(self._rewards) == self._config.stop_steps and self._config.satisfied_by(mean):
            self.reached = mean

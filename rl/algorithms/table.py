"""Algorithms by the name that `algorithm.advantage` gives them.

To add one, enter it here and its name in `conf.training.ADVANTAGES`, since the configuration, a floor below, checks
names.
"""

from __future__ import annotations

from collections.abc import Callable

from conf.training import AlgorithmConfig
from rl.algorithms.base import Algorithm
from rl.algorithms.grpo import DrGrpo, Grpo, Rloo
from rl.algorithms.reinforce import ReinforcePP, ReinforcePPBaseline
from rl.algorithms.turn_credit import TurnCredit

ALGORITHMS: dict[str, Callable[[AlgorithmConfig], Algorithm]] = {
    "grpo": Grpo,
    "mean": DrGrpo,
    "rloo": Rloo,
    "reinforce_pp": ReinforcePP,
    "reinforce_pp_baseline": ReinforcePPBaseline,
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Return the algorithm that the config names. Raises ValueError for a name that is not in the table."""
    if config.advantage not in ALGORITHMS:
        raise ValueError(f"algorithm.advantage={config.advantage!r} is not one of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[config.advantage](config)
    return TurnCredit(config, algorithm) if config.credit == "turn" else algorithm

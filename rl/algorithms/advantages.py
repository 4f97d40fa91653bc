"""Advantages of whole streams from the rewards of their group, and what a whole batch does to advantages. Pure functions.

Invariants:
* a group whose rewards are all equal has advantages that are 0, but for rounding;
* rewards, or advantages, that are all equal are worth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-5


def centred(rewards: np.ndarray) -> np.ndarray:
    """Return r - mean, float64 [G], from rewards [G]. Source: Dr. GRPO (arXiv 2503.20783)."""
    return rewards - rewards.mean()


def normalised(rewards: np.ndarray) -> np.ndarray:
    """Return (r - mean) / (std + 1e-5), float64 [G], from rewards [G]; std is the population's.

    Raises ValueError for a group of one stream, whose advantage would always be 0.
    Source: GRPO (arXiv 2402.03300, section 4.1.2).
    """
    if len(rewards) < 2:
        raise ValueError("algorithm.group_size=1: a group-normalised advantage needs at least 2 streams a group")
    return centred(rewards) / (rewards.std() + EPSILON)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Return r - mean of the others, float64 [G], from rewards [G], G >= 2. Source: RLOO (arXiv 2402.14740, eq. 7).

    A mean that includes the stream itself is closer to it by (G - 1) / G.
    """
    count = len(rewards)
    return centred(rewards) * count / (count - 1)


def whitened(advantages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return (a - mean) / (std + 1e-5) of a batch, float64 [targets] each, from advantages [targets] of each stream.

    Mean and standard deviation (the population's) are over all tokens: a stream counts by its length, so that what is added
    up in the gradient has mean 0. Source: REINFORCE++ (arXiv 2501.03262).
    """
    if not any(len(values) for values in advantages):
        return list(advantages)
    pooled = np.concatenate(advantages)
    mean, std = pooled.mean(), pooled.std()
    return [(values - mean) / (std + EPSILON) for values in advantages]

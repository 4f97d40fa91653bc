"""Advantages of whole streams from the rewards of their group. Pure functions.

Invariants:
* a group whose rewards are all equal has advantages that are 0, but for rounding.
"""

from __future__ import annotations

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

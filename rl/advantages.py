"""Advantages from the rewards of a group.

Pure functions; a group whose rewards are all equal has advantage 0 everywhere.
"""

from __future__ import annotations

import numpy as np

ADVANTAGES = ("grpo", "mean")
EPSILON = 1e-5


def group_advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """float64 [G] from rewards [G].

    `grpo`: (r - mean) / (std + 1e-5) over the group (arXiv 2402.03300, section 4.1.2). `mean`: r - mean (Dr. GRPO,
    arXiv 2503.20783). Raises ValueError for a group of one under `grpo`: its advantage is 0 whatever it does.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"algorithm.advantage={kind!r} is not one of {', '.join(ADVANTAGES)}")
    if kind == "grpo" and len(rewards) < 2:
        raise ValueError("algorithm.group_size=1: a group-normalised advantage needs at least 2 streams a group")
    centred = rewards - rewards.mean()
    return centred if kind == "mean" else centred / (rewards.std() + EPSILON)

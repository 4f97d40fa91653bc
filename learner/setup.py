"""What a learner rank is made from, and its place among the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learner.config import LearnerConfig
from streams.layout.layout import LayoutConfig
from streams.messages import MESSAGES_VERSION


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands. host, port: rank 0's store (port 0 = a lone rank opens its own). timeout_s: of any collective."""

    rank: int = 0
    world: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    timeout_s: float = 600.0


@dataclass(frozen=True)
class LearnerSetup:
    """What a learner rank needs before its first step.

    reference: the checkpoint that RL started from, for the KL to it (empty = none is held); a resume names the same one.
    outlier_above: the difference of log-probs above which a token is reported.
    """

    checkpoint: str
    layout: LayoutConfig
    learner: LearnerConfig
    total_steps: int
    seed: int
    version: int = 0
    reference: str = ""
    outlier_above: float = math.inf
    vision_attention: str = "auto"
    messages_version: int = MESSAGES_VERSION

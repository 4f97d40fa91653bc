"""What a learner rank is made from, and its place among the ranks.

Invariants:
- Importing this module loads no torch.
- A setup is a value: nobody changes it after sending.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from learner.config import LearnerConfig
from streams.layout.layout import LayoutConfig
from streams.messages import MESSAGES_VERSION


@dataclass(frozen=True)
class RankPlace:
    """A learner rank's place in the process group.

    Attributes:
        rank, world: This rank and how many there are.
        host, port: Address of rank 0's TCPStore; a single rank opens none.
        timeout_s: Timeout of every collective.
    """

    rank: int = 0
    world: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    timeout_s: float = 600.0


@dataclass(frozen=True)
class LearnerSetup:
    """What a learner rank needs before its first step.

    Attributes:
        checkpoint: Folder of the weights to start from.
        layout: How turns are laid out in tokens.
        learner: The learner's settings in this stage.
        total_steps: Length of the learning-rate schedule.
        seed: Seed of all random generators.
        version: Optimiser steps that the weights have behind them.
        reference: The checkpoint that RL started from, also after a resume, for the KL to it; empty = none is loaded.
        outlier_above: Absolute difference of log-probs above which a token is reported.
        vision_attention: Kernel of the vision tower, see `model.vision_attention`.
        fused_kernels: Of the text model, see `model.fused_kernels`.
        messages_version: Version of the sender's messages.
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
    fused_kernels: str = "auto"
    messages_version: int = MESSAGES_VERSION

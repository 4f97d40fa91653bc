"""Losses and training items as the learner's tests use them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.batching import TrainItem
from learner.losses.config import PolicyGradientConfig, SupervisedConfig
from streams.messages import GroupPayload

SFT = SupervisedConfig(balance_decisions=True, decision_weight_clamp=20.0, answer_weight=1.0)
GRPO = PolicyGradientConfig(clip_low=0.2, clip_high=0.2)


def even(payload: GroupPayload, advantages: Sequence[float]) -> TrainItem:
    """Return a group in which all targets of a stream have that stream's advantage."""
    logs = payload.logs[: len(advantages)]
    return TrainItem(payload, tuple(np.full(int(log.target.sum()), a) for log, a in zip(logs, advantages, strict=True)))

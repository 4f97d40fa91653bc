"""The policy loss as tests call it, and what it was before it had a family: the clipped ratio alone."""

from __future__ import annotations

import numpy as np
import torch

from learner.losses.config import PolicyGradientConfig
from learner.losses.policy_gradient import policy_loss
from learner.losses.units import BatchUnits

MOST_LOG_RATIO = 20.0


def one_stream(tokens: int) -> BatchUnits:
    """All tokens in one turn of one stream."""
    return BatchUnits.of(np.zeros(tokens, np.int64), np.zeros(tokens, np.int64))


def grpo_loss(logp, behaviour, advantage, *, normaliser, clip_low, clip_high, reference=None, kl_coef=0.0):
    """The family's first member, by its bounds."""
    config = PolicyGradientConfig(clip_low, clip_high, kl_coef)
    return policy_loss(
        logp, behaviour, advantage, config, normaliser=normaliser, units=one_stream(len(logp)), reference=reference
    )


def former_loss(logp, behaviour, advantage, *, normaliser, clip_low, clip_high, reference=None, kl_coef=0.0):
    """(loss, sums) in the operations of the version before: what every former run was trained with."""
    log_ratio = (logp - behaviour).clamp(max=MOST_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        sums = {
            "clip_share": (clipped * advantage < ratio * advantage).to(logp.dtype).sum(),
            "ratio": ratio.sum(),
            "behaviour_kl": (ratio - 1.0 - log_ratio).sum(),
            "ratio_square": ratio.square().sum(),
        }
    loss = -objective.sum()
    if reference is not None:
        difference = (reference - logp).clamp(max=MOST_LOG_RATIO)
        kl = difference.exp() - difference - 1.0
        loss = loss + kl_coef * kl.sum()
        sums["kl"] = kl.detach().sum()
    return loss / normaliser, sums

"""The objectives of policy-gradient losses at sampled tokens. Pure functions; all are to be made large.

Invariants:
- Log-ratios are bounded by MAX_LOG_RATIO before any exponential, so no value and no gradient is infinite.
- Arguments are [N]. `log_ratio` has the gradient; `advantage` has none.
- Each returns the objective [N] and where it was bounded, bool [N].
"""

from __future__ import annotations

import torch

from learner.losses.kl import MAX_LOG_RATIO
from learner.losses.units import Units

Objective = tuple[torch.Tensor, torch.Tensor]

MAX_RATIO = 20.0
"""Bound of DPPO's ratio, which pulls down tokens that have become likely again; verl's constant."""


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return exp of a bounded log-ratio."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def averaged(log_ratio: torch.Tensor, units: Units) -> torch.Tensor:
    """Return each unit's mean log-ratio at each of its tokens, with the gradient of the token itself.

    Summed over a unit of n tokens with weight 1 / n, that is the gradient of the unit's mean.
    Source: GSPO (arXiv 2507.18071, eq. 7 for streams; its token form, eq. 15).
    """
    return units.mean(log_ratio.detach()) + (log_ratio - log_ratio.detach())


def ppo(log_ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float, dual: float = 0.0) -> Objective:
    """min(r A, clip(r, 1 - low, 1 + high) A), and with `dual` at least dual * A where A < 0.

    Source: PPO (arXiv 1707.06347, eq. 7), separate bounds from DAPO (arXiv 2503.14476, eq. 10), dual clip from
    arXiv 1912.09729, eq. 5.
    """
    ratio = ratio_of(log_ratio)
    plain, clipped = ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage
    # Count the clip where it changes the objective, not wherever the ratio leaves the interval.
    objective, active = torch.minimum(plain, clipped), clipped < plain
    if dual:
        bound = dual * advantage
        below = (advantage < 0) & (objective < bound)
        objective, active = torch.where(below, bound, objective), active | below
    return objective, active


def cispo(logp: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> Objective:
    """sg(clip(r, 1 - low, 1 + high)) A log p: the weight is clipped, and every token keeps its gradient.

    Source: CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4); bounds as distances from 1.
    """
    ratio = ratio_of(log_ratio.detach())
    weight = ratio.clamp(1.0 - low, 1.0 + high)
    return weight * advantage * logp, weight != ratio


def dppo(logp: torch.Tensor, behaviour: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> Objective:
    """sg(min(r, MAX_RATIO)) A log p where p has not moved too far in A's direction: p - p_old at most `high`, at least -`low`.

    Source: DPPO with total variation, as verl has it (`dppo_tv`).
    """
    now = logp.detach()
    moved = now.exp() - behaviour.exp()
    kept = torch.where(advantage > 0, moved <= high, moved >= -low)
    # A token without advantage has no gradient to lose.
    weight = ratio_of(now - behaviour).clamp(max=MAX_RATIO) * kept
    return weight * advantage * logp, ~kept & (advantage != 0)

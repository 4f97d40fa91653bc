"""Weights that correct for samples of another policy than the one that is trained. Pure.

Invariants:
- Weights have no gradient.
- Nothing is divided by how many tokens are left: see `learner.losses.units`.
"""

from __future__ import annotations

import torch

from learner.losses.config import PolicyGradientConfig
from learner.losses.objectives import ratio_of
from learner.losses.units import Units


def weights(log_ratio: torch.Tensor, streams: Units, config: PolicyGradientConfig) -> torch.Tensor | None:
    """Return what each token's objective is multiplied by, [N]; None: by 1.

    log_ratio: log-prob of the policy that is trained, less the recorded one, [N]. Against the recorded policy
    (`old_policy=behaviour`) the objective has this ratio already, so weights are 0 or 1.
    Source: truncated importance sampling, token masks as IcePop (Ring-1T, arXiv 2510.18855), and masks of whole sequences by
    the geometric mean of their ratios, as verl has the three ("rollout correction").
    """
    if config.correction == "none":
        return None
    low, high = config.correction_min, config.correction_max
    ratio = ratio_of(log_ratio.detach())
    if config.correction == "truncate":
        return ratio.clamp(max=high)
    judged = ratio if config.correction == "token_mask" else ratio_of(streams.mean(log_ratio.detach()))
    kept = ((judged >= low) & (judged <= high)).to(ratio)
    return kept if config.old_policy == "behaviour" else torch.where(kept > 0, ratio, kept)

"""Divergences at sampled tokens, as terms of a loss or of the reward, and the bound that keeps their exponentials finite."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0
"""Upper bound of a difference of log-probs before `exp`. In float32 `exp` overflows from 88 on, and infinity times an
advantage of 0 is NaN. Up to the bound nothing changes; above it the value stays exp(20), about 5e8, and the gradient is
0. verl bounds its log-ratios by the same number."""


def k3_kl(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimate KL(current || reference) at sampled tokens, [N]: exp(d) - d - 1 >= 0 with d = reference - logp.

    logp, reference: log-probs [N]. d is bounded by MAX_LOG_RATIO.
    Source: estimator k3 of http://joschu.net/blog/kl-approx.html, as the KL term of GRPO (arXiv 2402.03300, eq. 4).
    """
    difference = (reference - logp).clamp(max=MAX_LOG_RATIO)
    return difference.exp() - difference - 1.0


def k2_kl(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimate KL(current || reference) at sampled tokens, [N]: d^2 / 2 with d = logp - reference.

    Biased as a value, but its gradient is that of the KL. d is bounded by MAX_LOG_RATIO on both sides.
    Source: estimator k2 of http://joschu.net/blog/kl-approx.html.
    """
    return (logp - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square() / 2


def k1_kl(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimate KL(current || reference) at sampled tokens, [N]: logp - reference, without bias, and of either sign.

    Its gradient is 0 in expectation, so it is a term of the reward only. Bounded by MAX_LOG_RATIO on both sides.
    Source: estimator k1 of http://joschu.net/blog/kl-approx.html.
    """
    return (logp - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


ESTIMATORS = {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}

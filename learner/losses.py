"""Losses: pure functions of log-probs that return (loss, metrics).

Invariants: a loss is a sum over this micro-batch divided by the whole step's normaliser, so the
gradient of a step does not depend on how it was cut into micro-batches; metrics are sums, divided by the caller; no
exponential overflows, so a single token that is far off costs neither the step's loss nor its gradient.
"""

from __future__ import annotations

import torch

Sums = dict[str, torch.Tensor]

MAX_LOG_RATIO = 20.0
"""Upper bound of a difference of log-probs before `exp`: float32 overflows from 88 on, and infinity times an advantage of 0
is NaN. Nothing changes up to the bound; above it the value stays exp(20), about 5e8, and the gradient is 0. verl bounds
its log-ratios by the same number."""


def grpo_loss(
    logp: torch.Tensor,
    behaviour: torch.Tensor,
    advantage: torch.Tensor,
    *,
    normaliser: float,
    clip_low: float,
    clip_high: float,
    reference: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, Sums]:
    """Clipped policy gradient plus `kl_coef` times the KL to the frozen reference, token mean; all inputs [N].

    The ratio is taken against the recorded behaviour log-probs, so it is right for streams of any age. Log-ratios are bounded
    by MAX_LOG_RATIO, also in the metrics.
    Source: PPO (arXiv 1707.06347, eq. 7) with group-relative advantages (GRPO, arXiv 2402.03300, eq. 3) and separate
    clip bounds (DAPO, arXiv 2503.14476, eq. 10).
    """
    log_ratio = (logp - behaviour).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        # The clip is active where it changes the objective, not wherever the ratio leaves the interval.
        active = (clipped * advantage < ratio * advantage).to(logp.dtype)
        sums = {
            "clip_share": active.sum(),
            "ratio": ratio.sum(),
            # k3 estimator of KL(behaviour || current), http://joschu.net/blog/kl-approx.html
            "behaviour_kl": (ratio - 1.0 - log_ratio).sum(),
            "ratio_square": ratio.square().sum(),
        }
    loss = -objective.sum()
    if reference is not None:
        kl = k3_kl(logp, reference)
        loss = loss + kl_coef * kl.sum()
        sums["kl"] = kl.detach().sum()
    return loss / normaliser, sums


def k3_kl(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimate [N] of KL(current || reference) at sampled tokens: exp(d) - d - 1 >= 0 with d = reference - logp.

    d is bounded by MAX_LOG_RATIO.
    Source: estimator k3 of http://joschu.net/blog/kl-approx.html, as the KL term of GRPO (arXiv 2402.03300, eq. 4).
    """
    difference = (reference - logp).clamp(max=MAX_LOG_RATIO)
    return difference.exp() - difference - 1.0


def decision_weights(silent: int, spoken: int, clamp: float) -> tuple[float, float]:
    """(weight of <silent>, weight of <response>) that balance the two decisions of a step: N / (2 n), clamped.

    Source: ThinkStream (arXiv 2603.12938), cold-start loss.
    """
    total = silent + spoken
    return (
        min(total / (2 * silent), clamp) if silent else 1.0,
        min(total / (2 * spoken), clamp) if spoken else 1.0,
    )


def sft_loss(logp: torch.Tensor, weight: torch.Tensor, *, normaliser: float) -> tuple[torch.Tensor, Sums]:
    """Weighted cross-entropy: -sum(weight * logp) / normaliser; inputs [N]."""
    with torch.no_grad():
        sums = {"nll": -logp.sum()}
    return -(weight * logp).sum() / normaliser, sums

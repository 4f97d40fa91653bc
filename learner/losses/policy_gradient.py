"""The clipped policy gradient of GRPO and its kin, with an optional KL to the frozen reference.

Invariants:
- The ratio is taken against the recorded behaviour log-probs, so it is right for streams of any age.
- Every target has its own advantage; an algorithm that judges whole streams gives all targets of a stream the same one.
- No exponential overflows, so one extreme token makes neither the step's loss nor its gradient infinite.
"""

from __future__ import annotations

import numpy as np
import torch

from learner.batching import MicroBatch, RankWork
from learner.losses.base import Loss, LossValue, Sums, or_infinite
from learner.losses.config import PolicyGradientConfig
from learner.losses.kl import MAX_LOG_RATIO, k3_kl
from streams.backbone.boundary import Boundary


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
    """Return the clipped policy-gradient loss plus `kl_coef` times the KL to the frozen reference, and metrics.

    logp, behaviour, advantage, reference: [N]. normaliser: what the sum over the targets is divided by.
    Log-ratios are bounded by MAX_LOG_RATIO, also in the metrics.
    Source: PPO (arXiv 1707.06347, eq. 7) with group-relative advantages (GRPO, arXiv 2402.03300, eq. 3) and separate
    clip bounds (DAPO, arXiv 2503.14476, eq. 10).
    """
    log_ratio = (logp - behaviour).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        # Count the clip where it changes the objective, not wherever the ratio leaves the interval.
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


class PolicyGradient(Loss[PolicyGradientConfig]):
    """`grpo_loss` over the sampled tokens of a step, token mean."""

    sampled = True

    @property
    def needs_reference(self) -> bool:
        return self.config.kl_coef > 0

    @staticmethod
    def problem(config: PolicyGradientConfig, work: RankWork, *, has_reference: bool, boundary: Boundary) -> str | None:
        if config.kl_coef and not has_reference:
            return f"algorithm.kl_coef={config.kl_coef} but the learner was set up without a reference checkpoint"
        if config.kl_coef and boundary is Boundary.TOWER and "frames" in work.media_kinds:
            return "learner.freeze=tower: the reference has no tower, so it cannot score frames (ship pre-merger rows)"
        for log in work.logs:
            if not log.header.trainable:
                return f"stream {log.header.stream_id} was decoded greedily: it can be scored but not trained on"
        if len(work.advantages) != len(work.logs):
            return f"{len(work.logs)} streams but {len(work.advantages)} advantages"
        for log, advantages in zip(work.logs, work.advantages, strict=True):
            if len(advantages) != int(log.target.sum()):
                return f"stream {log.header.stream_id}: {len(advantages)} advantages but {int(log.target.sum())} target tokens"
        return None

    def __call__(self, logp: torch.Tensor, batch: MicroBatch, reference: torch.Tensor | None) -> LossValue:
        scored = logp.detach().double().cpu().numpy()
        behaviour, advantage = batch.column("behaviour_logp"), batch.advantage()
        value, sums = grpo_loss(
            logp,
            torch.from_numpy(behaviour).to(logp),
            torch.from_numpy(advantage).to(logp),
            normaliser=self.normaliser,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            reference=reference,
            kl_coef=self.config.kl_coef,
        )
        # An advantage that is not finite spoils the step as a log-prob would, so its stream must be named, too.
        return LossValue(value, sums, or_infinite(np.where(np.isfinite(advantage), scored - behaviour, np.inf)))

"""The policy gradient of GRPO and its kin, with an optional KL to the frozen reference.

Invariants:
- The ratio is taken against the recorded behaviour log-probs, so it is right for streams of any age; with
  `old_policy=current` against the policy itself, and a correction may weigh by the former.
- Every target has its own advantage; an algorithm that judges whole streams gives all targets of a stream the same one.
- No exponential overflows, so one extreme token makes neither the step's loss nor its gradient infinite.
- Everything is divided by what was counted before any token was left out.
"""

from __future__ import annotations

import numpy as np
import torch

from learner.batching import MicroBatch, RankWork
from learner.losses import correction, objectives
from learner.losses.base import Loss, LossValue, Sums, TargetCounts, or_infinite
from learner.losses.config import PolicyGradientConfig
from learner.losses.kl import ESTIMATORS, MAX_LOG_RATIO
from learner.losses.units import BatchUnits
from streams.backbone.boundary import Boundary
from streams.layout.layout import LayoutTokens
from streams.log.record import Kind


def policy_loss(
    logp: torch.Tensor,
    behaviour: torch.Tensor,
    advantage: torch.Tensor,
    config: PolicyGradientConfig,
    *,
    normaliser: float,
    units: BatchUnits,
    reference: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Sums]:
    """Return the loss of N sampled tokens, and metrics.

    logp, behaviour, advantage, reference: [N]; logp has the gradient. normaliser: see `normaliser_of`. reference: needed for
    a KL. Log-ratios are bounded by MAX_LOG_RATIO, also in the metrics.
    Source: GRPO (arXiv 2402.03300, eq. 3), and for each objective where `learner.losses.objectives` has it.
    """
    kl = None
    if reference is not None and config.kl_in == "reward":
        # Of the policy that sampled, as rewards are: it is known, and has no gradient.
        kl = ESTIMATORS[config.kl](behaviour, reference)
        advantage = advantage - config.kl_coef * units.turn.to_go(kl)
    objective, bounded = _objective(logp, behaviour, advantage, config, units)
    weight = correction.weights(logp - behaviour, units.stream, config)
    share = _share(logp, config, units)
    with torch.no_grad():
        log_ratio = (logp - behaviour).clamp(max=MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        sums = {
            "clip_share": bounded.to(logp.dtype).sum(),
            "ratio": ratio.sum(),
            # k3 estimator of KL(behaviour || current), http://joschu.net/blog/kl-approx.html
            "behaviour_kl": (ratio - 1.0 - log_ratio).sum(),
            "ratio_square": ratio.square().sum(),
        }
        if weight is not None:
            sums["masked_share"] = (weight == 0).to(logp.dtype).sum()
            sums["correction_weight"] = weight.sum()
    loss = -_total(objective if weight is None else objective * weight, share)
    if config.square_coef:
        square = (logp - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()
        loss = loss + config.square_coef * _total(square, share)
    if reference is not None and kl is None:
        kl = ESTIMATORS[config.kl](logp, reference)
        loss = loss + config.kl_coef * _total(kl, share)
    if kl is not None:
        sums["kl"] = kl.detach().sum()
    return loss / normaliser, sums


def entropy_bonus(entropy: torch.Tensor, chosen: torch.Tensor, floor: float) -> torch.Tensor:
    """Return what entropies [N] add to the objective, [N]: those of chosen tokens, bool [N], none more than a floor above 0.

    So with a floor only tokens below it are lifted.
    """
    lifted = entropy.clamp(max=floor) if floor else entropy
    return torch.where(chosen, lifted, torch.zeros_like(lifted))


def normaliser_of(config: PolicyGradientConfig, totals: TargetCounts) -> float:
    """Return what the sum over a step is divided by: its targets, turns or streams, of all ranks."""
    counted = {
        "token_mean": totals.targets,
        "turn_mean": totals.turns,
        "stream_mean": totals.streams,
        "token_sum": totals.streams * config.sum_tokens,
    }
    return float(counted[config.aggregate])


def _objective(
    logp: torch.Tensor,
    behaviour: torch.Tensor,
    advantage: torch.Tensor,
    config: PolicyGradientConfig,
    units: BatchUnits,
) -> objectives.Objective:
    low, high = config.clip_low, config.clip_high
    # A batch is trained on once, so the policy before the step is the policy itself.
    log_ratio = logp - (behaviour if config.old_policy == "behaviour" else logp.detach())
    if config.policy_loss == "cispo":
        return objectives.cispo(logp, log_ratio, advantage, low, high)
    if config.policy_loss == "dppo":
        return objectives.dppo(logp, behaviour, advantage, low, high)
    if config.ratio != "token":
        log_ratio = objectives.averaged(log_ratio, units.named(config.ratio))
    return objectives.ppo(log_ratio, advantage, low, high, config.dual_clip)


def _share(like: torch.Tensor, config: PolicyGradientConfig, units: BatchUnits) -> torch.Tensor | None:
    """Return the weight of each token beside the others of its turn or stream, [N]; None: 1."""
    if config.aggregate in ("token_mean", "token_sum"):
        return None
    return 1.0 / units.named(config.aggregate.removesuffix("_mean")).size(like)


def _total(values: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    return values.sum() if share is None else (values * share).sum()


class PolicyGradient(Loss[PolicyGradientConfig]):
    """`policy_loss` over the sampled tokens of a step."""

    sampled = True

    def __init__(self, config: PolicyGradientConfig, totals: TargetCounts, tokens: LayoutTokens) -> None:
        super().__init__(config, totals, tokens)
        self.normaliser = normaliser_of(config, totals)

    @property
    def needs_reference(self) -> bool:
        return self.config.kl_coef > 0

    @property
    def needs_entropy(self) -> bool:
        return self.config.entropy_coef > 0

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

    def __call__(
        self, logp: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, reference: torch.Tensor | None
    ) -> LossValue:
        scored = logp.detach().double().cpu().numpy()
        behaviour, advantage = batch.column("behaviour_logp"), batch.advantage()
        units = BatchUnits.of(batch.rows.stream.numpy(), batch.column("turn"))
        value, sums = policy_loss(
            logp,
            torch.from_numpy(behaviour).to(logp),
            torch.from_numpy(advantage).to(logp),
            self.config,
            normaliser=self.normaliser,
            units=units,
            reference=reference,
        )
        if self.needs_entropy:
            kinds = torch.from_numpy(
                np.isin(batch.column("kind"), [Kind[name.upper()] for name in self.config.entropy_kinds])
            )
            bonus = entropy_bonus(entropy, kinds.to(entropy.device), self.config.entropy_floor)
            share = _share(logp, self.config, units)
            value = value - self.config.entropy_coef * _total(bonus, share) / self.normaliser
        # An advantage that is not finite spoils the step as a log-prob would, so its stream must be named, too.
        return LossValue(value, sums, or_infinite(np.where(np.isfinite(advantage), scored - behaviour, np.inf)))

"""Settings of the losses: what a TrainBatch carries, and all that the driver knows about a loss.

Invariants:
- Importing this module loads no torch.
- A config is a frozen value. One that cannot work raises ValueError when it is made, with the config key it comes from.
- `learner.losses.table` has the loss of every config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """Base class of the settings of a loss. The type determines the loss, the fields are its settings."""


POLICY_LOSSES = ("ppo", "cispo", "dppo")
RATIOS = ("token", "turn", "stream")
AGGREGATES = ("token_mean", "stream_mean", "turn_mean", "token_sum")
OLD_POLICIES = ("behaviour", "current")
CORRECTIONS = ("none", "truncate", "token_mask", "stream_mask")
KLS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")
ENTROPY_KINDS = ("think", "decision", "response", "end")
_CHOICES = {
    "policy_loss": POLICY_LOSSES,
    "ratio": RATIOS,
    "aggregate": AGGREGATES,
    "old_policy": OLD_POLICIES,
    "correction": CORRECTIONS,
    "kl": KLS,
    "kl_in": KL_PLACES,
}


@dataclass(frozen=True)
class PolicyGradientConfig(LossConfig):
    """Settings of the policy gradient (GRPO and its kin); `learner.losses.policy_gradient` has the formulas.

    Attributes:
        clip_low: The ratio is clipped below 1 - clip_low; in (0, 1), with cispo in (0, 1].
        clip_high: The ratio is clipped above 1 + clip_high; above 0.
        kl_coef: Weight of the KL to the frozen reference; 0 = no KL is computed.
        policy_loss: One of POLICY_LOSSES.
        ratio: Over what log-ratios are averaged, one of RATIOS.
        dual_clip: Bound on the loss of tokens with a negative advantage, as a multiple of it; 0 = none.
        square_coef: Weight of the squared log-ratio.
        aggregate: One of AGGREGATES.
        sum_tokens: What `aggregate=token_sum` divides the sum of a stream by; 0 otherwise.
        old_policy: What the ratio is taken against, one of OLD_POLICIES.
        correction: One of CORRECTIONS, with the bounds correction_min and correction_max of the ratio.
        kl: Estimator of the KL to the reference, one of KLS. kl_in: what it is a term of, one of KL_PLACES.
        entropy_coef: Weight of the entropy bonus; 0 = none. It is of tokens of these entropy_kinds (of ENTROPY_KINDS), and of
            each no more than entropy_floor nats; 0 = all of it.
    """

    clip_low: float
    clip_high: float
    kl_coef: float = 0.0
    policy_loss: str = "ppo"
    ratio: str = "token"
    dual_clip: float = 0.0
    square_coef: float = 0.0
    aggregate: str = "token_mean"
    sum_tokens: int = 0
    old_policy: str = "behaviour"
    correction: str = "none"
    correction_min: float = 0.5
    correction_max: float = 2.0
    kl: str = "k3"
    kl_in: str = "loss"
    entropy_coef: float = 0.0
    entropy_floor: float = 0.0
    entropy_kinds: tuple[str, ...] = ENTROPY_KINDS

    def __post_init__(self) -> None:
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"algorithm.{key}={getattr(self, key)!r} is not one of {', '.join(known)}")
        self._check_numbers()
        self._check_pairs()

    def _check_numbers(self) -> None:
        low_fits = 0 < self.clip_low < 1 or (self.clip_low == 1 and self.policy_loss == "cispo")
        if not (low_fits and 0 < self.clip_high < math.inf):
            raise ValueError(
                f"algorithm.clip_low={self.clip_low} must lie in (0, 1), algorithm.clip_high={self.clip_high} above 0 "
                "(with algorithm.policy_loss=cispo clip_low may be 1, which bounds nothing)"
            )
        for key in ("kl_coef", "square_coef", "entropy_coef", "entropy_floor"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"algorithm.{key}={getattr(self, key)} must be 0 or a positive number")
        if self.dual_clip and not 1 < self.dual_clip < math.inf:
            raise ValueError(
                f"algorithm.dual_clip={self.dual_clip} must be 0 (off) or above 1: it bounds ratios above 1"
            )
        if not 0 < self.correction_min < 1 < self.correction_max < math.inf:
            raise ValueError(
                f"algorithm.correction_min={self.correction_min} must lie in (0, 1), "
                f"algorithm.correction_max={self.correction_max} above 1: a ratio of 1 is a sample of the policy itself"
            )
        if (self.sum_tokens > 0) != (self.aggregate == "token_sum"):
            raise ValueError(
                f"algorithm.sum_tokens={self.sum_tokens} with algorithm.aggregate={self.aggregate}: token_sum divides a "
                "stream's sum by it, so it must be above 0 there, and 0 with the others"
            )

    def _check_pairs(self) -> None:
        """Raise ValueError for settings that make no sense together."""
        unknown = set(self.entropy_kinds) - set(ENTROPY_KINDS)
        if unknown or not self.entropy_kinds:
            raise ValueError(
                f"algorithm.entropy_kinds={list(self.entropy_kinds)} must name some of {', '.join(ENTROPY_KINDS)}"
            )
        if self.entropy_floor and not self.entropy_coef:
            raise ValueError(
                f"algorithm.entropy_floor={self.entropy_floor} without algorithm.entropy_coef: nothing would lift entropy to it"
            )
        if self.kl == "k1" and self.kl_in == "loss":
            raise ValueError(
                "algorithm.kl=k1 with algorithm.kl_in=loss: its gradient is 0 in expectation, so it would hold nothing; use "
                "algorithm.kl_in=reward, or algorithm.kl=k2, whose gradient is that of the KL"
            )
        if self.policy_loss != "ppo":
            for key, off in (("ratio", "token"), ("dual_clip", 0)):
                if getattr(self, key) != off:
                    raise ValueError(
                        f"algorithm.{key}={getattr(self, key)} with algorithm.policy_loss={self.policy_loss}: only ppo clips "
                        f"a loss by it; use algorithm.{key}={off}"
                    )
        if self.old_policy == "current":
            if self.policy_loss != "ppo" or self.ratio != "token" or self.dual_clip:
                raise ValueError(
                    "algorithm.old_policy=current: its ratio is 1, since a batch is trained on once, so nothing is clipped; "
                    "use algorithm.policy_loss=ppo, ratio=token and dual_clip=0, and bound by algorithm.correction"
                )
        elif self.correction == "truncate":
            raise ValueError(
                "algorithm.correction=truncate with algorithm.old_policy=behaviour: the ratio has the behaviour policy "
                "already, the weight would count it twice; use algorithm.old_policy=current"
            )


@dataclass(frozen=True)
class SupervisedConfig(LossConfig):
    """Settings of the cold start's weighted cross-entropy.

    Attributes:
        balance_decisions: Weight silence and speech so that both decisions have the same total weight in a step.
        decision_weight_clamp: Largest weight of a decision token.
        answer_weight: Weight of the words of an answer.
    """

    balance_decisions: bool
    decision_weight_clamp: float
    answer_weight: float

    def __post_init__(self) -> None:
        if not (0 < self.decision_weight_clamp < math.inf and 0 < self.answer_weight < math.inf):
            raise ValueError(
                f"sft.decision_weight_clamp={self.decision_weight_clamp} and sft.answer_weight={self.answer_weight} "
                "must be positive numbers"
            )

"""Typed settings of the two training stages (Hydra keys `sft` and `algorithm`), and the length of a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from learner.losses.config import ENTROPY_KINDS, PolicyGradientConfig, SupervisedConfig


def check_length(job: str, steps: int, epochs: float) -> None:
    """Raise ValueError unless a stage's length is given either in optimiser steps or in passes over its tasks."""
    if steps < 0 or not (math.isfinite(epochs) and epochs >= 0):
        raise ValueError(f"{job}.steps={steps} and {job}.epochs={epochs} must not be negative")
    if bool(steps) == bool(epochs):
        raise ValueError(
            f"{job}.steps={steps} and {job}.epochs={epochs}: exactly one of them must be above 0, the other 0"
        )


def optimiser_steps(steps: int, epochs: float, tasks: int, batch: int) -> int:
    """Return `steps`, or the steps of `epochs` passes over the tasks, `batch` a step; the last step may wrap around."""
    if tasks < 1 or batch < 1:
        raise ValueError(f"{tasks} usable tasks and a batch of {batch}: both must be at least 1")
    # 0.1 * 30 tasks is 3.0000000000000004: that is three tasks, not a part of a fourth.
    return steps or math.ceil(epochs * tasks / batch - 1e-9)


def warmup_steps(ratio: float, total: int) -> int:
    """Return the warm-up steps: `ratio` of all, rounded up."""
    return math.ceil(ratio * total - 1e-9)


@dataclass(frozen=True)
class SftConfig:
    """The cold start: supervised training on demonstrations made from the rows."""

    steps: int = 60
    """Optimiser steps; 0 = given by `sft.epochs`. Exactly one of the two is above 0."""
    epochs: float = 0.0
    """Passes over the training rows, fractions allowed; 0 = given by `sft.steps`."""
    batch: int = 16
    """Streams per optimiser step."""
    warmup_ratio: float = 0.0
    """Share of the steps, in [0, 1], in which the learning rate rises, rounded up to whole steps; 0 =
    `learner.warmup_steps` decides.
    """
    late_probability: float = 0.0
    """Probability that a demonstrated answer comes late."""
    late_min: int = 1
    """Fewest chunks that a late answer is late by (uniform up to `sft.late_max`)."""
    late_max: int = 4
    """Most chunks that a late answer is late by."""
    balance_decisions: bool = True
    """Weigh the two decision tokens, `<silent>` and `<response>`, so that both count equally in a step."""
    decision_weight_clamp: float = 20.0
    """Largest weight that `sft.balance_decisions` gives to a decision token."""
    answer_weight: float = 1.0
    """Loss weight of the words of answers, which are few beside thoughts and tags."""
    pending_thought: str = ""
    """Thought of a demonstrated turn from when an answer is due until it is said; `{thought}` and `{answer}` are
    filled in. Empty = the thought stays as it is.
    """
    learner: dict[str, Any] = field(default_factory=dict)
    """Values that replace single `learner` settings during the cold start, by name: `sft.learner.lr=1e-4`.
    `ranks` must stay equal.
    """

    def __post_init__(self) -> None:
        check_length("sft", self.steps, self.epochs)
        if self.batch < 1:
            raise ValueError(f"sft.batch={self.batch} must be at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"sft.warmup_ratio={self.warmup_ratio} must lie in [0, 1]")
        if not 0 <= self.late_probability <= 1:
            raise ValueError(f"sft.late_probability={self.late_probability} must lie in [0, 1]")
        try:
            self.pending_thought.format(thought="", answer="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"sft.pending_thought={self.pending_thought!r} may use {{thought}} and {{answer}} only: {error!r}"
            ) from error
        if not 1 <= self.late_min <= self.late_max:
            raise ValueError(f"sft.late_min={self.late_min} and sft.late_max={self.late_max}: 1 <= min <= max")
        # Refuses weights that cannot work.
        _ = self.loss

    @property
    def loss(self) -> SupervisedConfig:
        """The loss of the cold start."""
        return SupervisedConfig(self.balance_decisions, self.decision_weight_clamp, self.answer_weight)


ADVANTAGES = ("grpo", "mean", "rloo", "reinforce_pp", "reinforce_pp_baseline")
"""What `algorithm.advantage` may be; `rl.algorithms.table` has the algorithm of each."""
CREDITS = ("stream", "turn")
TURN_FORMS = ("td", "return")
ZERO_SPREADS = ("train", "resample")


@dataclass(frozen=True)
class AlgorithmConfig:
    """The RL stage: `groups_per_step` x `group_size` streams make one optimiser step."""

    name: str = "grpo"
    """The family: only `grpo`, policy gradients of groups. Its members are the presets `algorithm=...`, and what they set."""
    mode: str = "async"
    """`async` = workers go on while the learner trains, `sync` = a step's groups are admitted once every worker
    runs the step's weights (age 0).
    """
    steps: int = 40
    """Optimiser steps; 0 = given by `algorithm.epochs`. Exactly one of the two is above 0."""
    epochs: float = 0.0
    """Passes over the training rows, fractions allowed; 0 = given by `algorithm.steps`."""
    warmup_ratio: float = 0.0
    """Share of the steps, in [0, 1], in which the learning rate rises, rounded up to whole steps; 0 =
    `learner.warmup_steps` decides.
    """
    groups_per_step: int = 8
    """Groups of one optimiser step (B)."""
    group_size: int = 8
    """Streams of one task in a group: at least 2 where the advantage compares them, 1 with
    `algorithm.advantage=reinforce_pp`.
    """
    groups_in_flight: int = 16
    """Groups that are admitted and not yet trained (C, at least B). With B and `weights.max_lag` it bounds the
    age of a sample: floor((C - 1) / B) + max_lag versions. Not used with `algorithm.mode=sync`.
    """
    advantage: str = "grpo"
    """`grpo` = (reward - mean) / (std + 1e-5) over the group, `mean` = reward - mean (Dr. GRPO), `rloo` =
    reward - mean of the others. Over all tokens of a step: `reinforce_pp` = (reward - mean) / (std + 1e-5),
    `reinforce_pp_baseline` = the same of `mean`'s.
    """
    clip_low: float = 0.2
    """The policy ratio is clipped below 1 - clip_low, in (0, 1)."""
    clip_high: float = 0.2
    """The policy ratio is clipped above 1 + clip_high."""
    zero_spread: str = "train"
    """Groups whose advantages are all 0: `train` = they fill their places in a step and teach nothing, `resample` = the
    next groups take them (DAPO's dynamic sampling). Not with `deterministic`.
    """
    resample_most: int = 16
    """Groups that `algorithm.zero_spread=resample` gives up between two optimiser steps, at most."""
    stop_when: float = 0.0
    """Mean reward of `algorithm.stop_steps` steps in a row at which the stage ends before its last step; 0 = it never does."""
    stop_steps: int = 5
    """Steps that `algorithm.stop_when` looks at."""
    credit: str = "stream"
    """`stream` = every token of a stream has its advantage, `turn` = an answer's worth goes to the turns that led to it."""
    turn_form: str = "td"
    """With `algorithm.credit=turn`: `td` = each turn has what it changed, `return` = every turn up to an answer has what it
    came to.
    """
    turn_weight: float = 1.0
    """Share of the credit by turn, in [0, 1]; the rest is the stream's advantage."""
    policy_loss: str = "ppo"
    """`ppo` = the clipped ratio (GRPO, DAPO; GSPO with `algorithm.ratio`), `cispo` = the gradient of every token under a
    clipped weight, `dppo` = tokens whose probability has moved by more than the clip bounds are left out.
    """
    ratio: str = "token"
    """Over what `ppo` averages log-ratios before it clips: `token`, `turn`, or `stream` (GSPO, whose bounds are about
    3e-4).
    """
    dual_clip: float = 0.0
    """With `ppo`, a token with a negative advantage loses at most this multiple of it; above 1, 0 = off."""
    square_coef: float = 0.0
    """Weight of the squared log-ratio to the recorded policy (with `dppo` usually 1e-3)."""
    aggregate: str = "token_mean"
    """What weighs the same in the loss: `token_mean` every token, `turn_mean` every turn, `stream_mean` every stream,
    `token_sum` = sums of streams, divided by `algorithm.sum_tokens` (Dr. GRPO).
    """
    sum_tokens: int = 0
    """Tokens that `algorithm.aggregate=token_sum` divides a stream's sum by; 0 with the others."""
    old_policy: str = "behaviour"
    """What the ratio is taken against: `behaviour` = the recorded log-probs, `current` = the policy before the step, with
    what lies between the two left to `algorithm.correction`.
    """
    correction: str = "none"
    """Weight for samples of an older policy: `none` = 1, `truncate` = the ratio to it, at most `algorithm.correction_max`;
    `token_mask` = 0 outside of the two bounds (IcePop), `stream_mask` = 0 for streams whose geometric mean is outside.
    Masks also weigh by the ratio with `algorithm.old_policy=current`; `truncate` needs that.
    """
    correction_min: float = 0.5
    """Lower bound of that ratio, in (0, 1)."""
    correction_max: float = 2.0
    """Upper bound of that ratio, above 1."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, which keeps a policy from settling too soon; 0 = none."""
    entropy_floor: float = 0.0
    """Nats up to which a token's entropy counts in the bonus: it lifts only what is below; 0 = all of it."""
    entropy_kinds: tuple[str, ...] = ENTROPY_KINDS
    """Tokens that the bonus is of, some of `think`, `decision`, `response`, `end`."""
    kl: str = "k3"
    """Estimator of `algorithm.kl_coef`'s KL: `k3`, `k2` = half the squared difference of log-probs, or in the reward `k1` =
    the difference.
    """
    kl_in: str = "loss"
    """`loss` = the KL of the policy that is trained is a term of its loss; `reward` = that of the policy which sampled is
    taken off the advantages: each token's, and those after it in its turn.
    """
    kl_coef: float = 0.0
    """Weight of the KL divergence to a frozen reference (0 = no reference is held)."""
    reference: str = "auto"
    """The frozen reference of `algorithm.kl_coef`: `auto` = the checkpoint that RL started from, also after a
    resume, or a checkpoint folder or hub id. Every learner rank holds its parameters in addition.
    """
    init: str = "auto"
    """Checkpoint that RL starts from: `auto` = the run's cold start, or its model if it has none; or a checkpoint
    folder or hub id.
    """

    def __post_init__(self) -> None:
        if self.name != "grpo":
            raise ValueError(f"algorithm.name={self.name!r}: only grpo is supported so far")
        if self.mode not in ("async", "sync"):
            raise ValueError(f"algorithm.mode={self.mode!r} is not one of async, sync")
        check_length("algorithm", self.steps, self.epochs)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"algorithm.warmup_ratio={self.warmup_ratio} must lie in [0, 1]")
        for key in ("groups_per_step", "group_size", "groups_in_flight"):
            if getattr(self, key) < 1:
                raise ValueError(f"algorithm.{key}={getattr(self, key)} must be at least 1")
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"algorithm.advantage={self.advantage!r} is not one of {', '.join(ADVANTAGES)}")
        by_batch = self.advantage == "reinforce_pp"
        if self.group_size == 1 and not (by_batch and self.credit == "stream"):
            raise ValueError(
                f"algorithm.group_size=1 with algorithm.advantage={self.advantage} and algorithm.credit={self.credit}: the "
                "advantage of a group of one is always 0, nothing would be learned; use at least 2 streams a group"
            )
        if by_batch and self.zero_spread == "resample":
            raise ValueError(
                "algorithm.zero_spread=resample with algorithm.advantage=reinforce_pp: streams are compared with the whole "
                "step, so a group whose streams did equally well teaches, too; use algorithm.zero_spread=train"
            )
        if by_batch and self.groups_per_step * self.group_size == 1:
            raise ValueError(
                "algorithm.groups_per_step=1 and algorithm.group_size=1: one stream has nothing to be compared with"
            )
        object.__setattr__(self, "entropy_kinds", tuple(self.entropy_kinds))
        for key, known in (("credit", CREDITS), ("turn_form", TURN_FORMS), ("zero_spread", ZERO_SPREADS)):
            if getattr(self, key) not in known:
                raise ValueError(f"algorithm.{key}={getattr(self, key)!r} is not one of {', '.join(known)}")
        if self.resample_most < 1:
            raise ValueError(
                f"algorithm.resample_most={self.resample_most} must be at least 1; algorithm.zero_spread=train gives none up"
            )
        if not (math.isfinite(self.stop_when) and self.stop_when >= 0):
            raise ValueError(f"algorithm.stop_when={self.stop_when} must be a mean reward above 0, or 0 for none")
        if self.stop_steps < 1:
            raise ValueError(f"algorithm.stop_steps={self.stop_steps} must be at least 1")
        if not 0 <= self.turn_weight <= 1:
            raise ValueError(f"algorithm.turn_weight={self.turn_weight} must lie in [0, 1]")
        # Refuses settings that its loss could not work with.
        _ = self.loss
        if not self.reference:
            raise ValueError("algorithm.reference is empty: use auto or a checkpoint folder")

    def satisfied_by(self, reward: float | None) -> bool:
        """Return whether the stage ends at this mean reward of `stop_steps` steps; None = it has trained fewer."""
        return reward is not None and 0 < self.stop_when <= reward

    @property
    def loss(self) -> PolicyGradientConfig:
        """The loss of RL: every setting of it has the key of its name."""
        return PolicyGradientConfig(
            **{setting.name: getattr(self, setting.name) for setting in fields(PolicyGradientConfig)}
        )

"""Typed settings of the two training stages (Hydra keys `sft` and `algorithm`), and the length of a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from learner.losses.config import PolicyGradientConfig, SupervisedConfig


def check_length(job: str, steps: int, epochs: float) -> None:
    """A stage's length is given either in optimiser steps or in passes over its tasks."""
    if steps < 0 or not (math.isfinite(epochs) and epochs >= 0):
        raise ValueError(f"{job}.steps={steps} and {job}.epochs={epochs} must not be negative")
    if bool(steps) == bool(epochs):
        raise ValueError(
            f"{job}.steps={steps} and {job}.epochs={epochs}: exactly one of them must be above 0, the other 0"
        )


def optimiser_steps(steps: int, epochs: float, tasks: int, batch: int) -> int:
    """`steps`, or as many as it takes to pass `epochs` times over the tasks, `batch` a step; the last may wrap around."""
    if tasks < 1 or batch < 1:
        raise ValueError(f"{tasks} usable tasks and a batch of {batch}: both must be at least 1")
    # 0.1 * 30 tasks is 3.0000000000000004: that is three tasks, not a part of a fourth.
    return steps or math.ceil(epochs * tasks / batch - 1e-9)


def warmup_steps(ratio: float, total: int) -> int:
    """Warm-up of `ratio` of all steps, rounded up."""
    return math.ceil(ratio * total - 1e-9)


@dataclass(frozen=True)
class SftConfig:
    """Cold start. steps or epochs (the other is 0): its length. warmup_ratio: share of the steps in which the learning
    rate rises, in place of learner.warmup_steps (0 = those).

    late_*: a demonstration speaks late by a uniform number of chunks with this probability. answer_weight: loss weight
    of the words of an answer, which are few beside thoughts and tags. pending_thought: how a thought reads while an
    answer is due and not yet said ("{thought}" and "{answer}" are filled in; empty = unchanged). learner: values that
    replace single `learner` settings during the cold start.
    """

    steps: int = 60
    epochs: float = 0.0
    batch: int = 16
    warmup_ratio: float = 0.0
    late_probability: float = 0.0
    late_min: int = 1
    late_max: int = 4
    balance_decisions: bool = True
    decision_weight_clamp: float = 20.0
    answer_weight: float = 1.0
    pending_thought: str = ""
    learner: dict[str, Any] = field(default_factory=dict)

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


@dataclass(frozen=True)
class AlgorithmConfig:
    """RL. groups_per_step x group_size streams make one optimiser step; groups_in_flight bounds their age.

    mode: `async`, or `sync` = a step's groups are admitted when every worker runs the step's weights (age 0).
    steps or epochs (the other is 0): its length. warmup_ratio: as `sft.warmup_ratio`.
    kl_coef: weight of the KL to a frozen reference (0 = none is held). reference: `auto` = the checkpoint that RL starts
    from (also after a resume), or a folder. It costs every learner rank the model's parameters once more.
    """

    name: str = "grpo"
    mode: str = "async"
    steps: int = 40
    epochs: float = 0.0
    warmup_ratio: float = 0.0
    groups_per_step: int = 8
    group_size: int = 8
    groups_in_flight: int = 16
    advantage: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    reference: str = "auto"
    init: str = "auto"

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
        if self.advantage not in ("grpo", "mean"):
            raise ValueError(f"algorithm.advantage={self.advantage!r} is not one of grpo, mean")
        if self.group_size == 1:
            raise ValueError(
                f"algorithm.group_size=1 with algorithm.advantage={self.advantage}: the advantage of a group of one is "
                "always 0, nothing would be learned; use at least 2 streams a group"
            )
        # Refuses settings that its loss could not work with.
        PolicyGradientConfig(self.clip_low, self.clip_high, self.kl_coef)
        if not self.reference:
            raise ValueError("algorithm.reference is empty: use auto or a checkpoint folder")

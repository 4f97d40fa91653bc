"""Which loss belongs to which config: the one place to enter a new loss."""

from __future__ import annotations

from typing import Any

from learner.losses.base import Loss
from learner.losses.config import LossConfig, PolicyGradientConfig, SupervisedConfig
from learner.losses.policy_gradient import PolicyGradient
from learner.losses.sft import Supervised

LOSSES: dict[type[LossConfig], type[Loss[Any]]] = {
    PolicyGradientConfig: PolicyGradient,
    SupervisedConfig: Supervised,
}


def loss_of(config: LossConfig) -> type[Loss[Any]]:
    """Return the loss that takes this config. Raises ValueError if none does."""
    found = LOSSES.get(type(config))
    if found is None:
        known = ", ".join(kind.__name__ for kind in LOSSES)
        raise ValueError(f"no loss takes a {type(config).__name__} (known: {known}): enter it in learner.losses.table")
    return found

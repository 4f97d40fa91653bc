"""Activation checkpointing: a layer's activations are computed again in the backward pass instead of being kept.

Invariants: results are the same to the last bit (no module draws random numbers: `Backbone.load` refuses
dropout); text layers always, vision blocks where the tower trains. transformers' layers checkpoint themselves while they
are in training mode, which changes nothing else in them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from streams.backbone.backbone import Backbone
from streams.backbone.boundary import Boundary


def checkpoint_activations(backbone: Backbone) -> int:
    """Turn it on, after `freeze` has said what trains; returns how many layers checkpoint.

    The flags are set layer by layer: the model's own switch has another name from release to release and takes in frozen
    towers. Not re-entrant: the tokens of a frozen embedding need no gradient, and our plan is no tensor.
    """
    layers = _layers(backbone.model.model.language_model)
    # Mergers that train on a frozen tower leave its blocks nothing to compute again.
    if any(Boundary.TOWER.below(name) for name in backbone.trainable()):
        layers += _layers(backbone.model.model.visual)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return len(layers)


def _layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]

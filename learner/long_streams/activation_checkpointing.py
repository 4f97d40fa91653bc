"""Activation checkpointing: a layer's activations are recomputed in the backward pass instead of being kept.

The layers of transformers checkpoint themselves while they are in training mode, which changes nothing else in them.

Invariants:
- Results are equal to the last bit: no module draws random numbers, since `Backbone.load` refuses dropout.
- Text layers are always checkpointed, vision blocks only if the tower trains.
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
    """Turn activation checkpointing on and return the number of layers that checkpoint. Call it after `freeze`.

    The flags are set layer by layer: the model's own switch changes its name from release to release, and includes
    frozen towers.
    """
    layers = _layers(backbone.model.model.language_model)
    # If only mergers train, backward does not reach the tower's blocks, and there is nothing to recompute in them.
    if any(Boundary.TOWER.below(name) for name in backbone.trainable()):
        layers += _layers(backbone.model.model.visual)
    for layer in layers:
        layer.gradient_checkpointing = True
        # Not re-entrant: that variant needs a tensor input with gradient, which a frozen embedding does not give.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return len(layers)


def _layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]

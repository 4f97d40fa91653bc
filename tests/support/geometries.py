"""Shapes of real checkpoints, for estimates that no weights are at hand for."""

from __future__ import annotations

from typing import Any

from streams.checkpoint.model_shape import ModelGeometry


def qwen2_5_vl(**language_model: Any) -> ModelGeometry:
    """The vision tower is the same in all sizes."""
    return ModelGeometry(
        model_type="qwen2_5_vl",
        vision_layers=32,
        vision_hidden=1280,
        vision_mlp=3420,
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        deepstack_levels=0,
        **language_model,
    )

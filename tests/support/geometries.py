"""Shapes of real checkpoints, for estimates without their weights."""

from __future__ import annotations

from typing import Any

from streams.checkpoint.model_shape import ModelGeometry


def qwen2_5_vl(**language_model: Any) -> ModelGeometry:
    """Return the shape of a Qwen2.5-VL. The vision tower is the same in all sizes."""
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


THREE_B = qwen2_5_vl(
    layers=36,
    hidden=2048,
    mlp=11008,
    heads=16,
    kv_heads=2,
    head_dim=128,
    vocab=151936,
    tied=True,
    parameters={},
)
"""Qwen2.5-VL-3B."""

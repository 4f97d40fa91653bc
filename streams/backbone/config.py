"""Typed settings of the model (Hydra key `model`).

Importing it loads neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from streams.backbone.kernel_choice import VISION_ATTENTION
from streams.backbone.tiny_spec import TinySpec


@dataclass(frozen=True)
class ModelConfig:
    """path: a checkpoint folder or hub id; empty = build the tiny random backbone of `tiny`.

    vision_attention: kernel of the vision tower; `auto` = flash-attn where it runs (CUDA, half precision, installed).
    """

    path: str = ""
    dtype: str = "float32"
    vision_attention: str = "auto"
    tiny: TinySpec = field(default_factory=TinySpec)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype={self.dtype!r} is not one of float32, bfloat16")
        if self.vision_attention not in VISION_ATTENTION:
            raise ValueError(
                f"model.vision_attention={self.vision_attention!r} is not one of {', '.join(VISION_ATTENTION)}"
            )

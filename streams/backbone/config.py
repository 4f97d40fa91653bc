"""Typed settings of the model (Hydra key `model`).

Importing it loads neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from streams.backbone.kernel_choice import FUSED_KERNELS, VISION_ATTENTION
from streams.backbone.tiny_spec import TinySpec


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained and run."""

    path: str = ""
    """Checkpoint folder or hub id of a Qwen2.5-VL or Qwen3-VL; empty = build the random model of `model.tiny`.
    `model=FOLDER` is short for it.
    """
    dtype: str = "float32"
    """Dtype of the rollout workers' model: `float32` or `bfloat16`. The learner's is `learner.dtype`."""
    vision_attention: str = "auto"
    """Attention kernel of the vision tower: `flash_attn`, `sdpa`, or `auto` = flash_attn where it runs (CUDA,
    half precision, installed), else sdpa.
    """
    fused_kernels: str = "auto"
    """Norms, rotation and gated units of the text model, in engine and learner: `triton`, one kernel each; `torch`, which
    computes in place where no gradient is asked for; `off`, the modules of transformers; or `auto` = triton where it runs
    (CUDA, half precision), else torch, whose results are those of `off`; in float64 off.
    """
    tiny: TinySpec = field(default_factory=TinySpec)
    """Shape of the random model."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype={self.dtype!r} is not one of float32, bfloat16")
        if self.vision_attention not in VISION_ATTENTION:
            raise ValueError(
                f"model.vision_attention={self.vision_attention!r} is not one of {', '.join(VISION_ATTENTION)}"
            )
        if self.fused_kernels not in FUSED_KERNELS:
            raise ValueError(f"model.fused_kernels={self.fused_kernels!r} is not one of {', '.join(FUSED_KERNELS)}")

"""Shape of a random backbone, tiny unless told otherwise (Hydra key `model.tiny`); `streams.backbone.tiny` builds it.

Importing it loads neither torch nor transformers: the configuration needs it on every command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streams.checkpoint.families import FAMILIES, MERGE, QWEN2_5_VL, QWEN3_VL, SUPPORTED_MODEL_TYPES, Family


@dataclass(frozen=True)
class TinySpec:
    """Shape of the random model that is built where `model.path` is empty."""

    model_type: str = QWEN2_5_VL.model_type
    """Architecture: `qwen2_5_vl` or `qwen3_vl`."""
    hidden: int = 128
    """Width of the text model."""
    layers: int = 3
    """Layers of the text model."""
    heads: int = 4
    """Query heads of the text model; `model.tiny.hidden` is a multiple of it."""
    kv_heads: int = 2
    """Key-value heads of the text model; `model.tiny.heads` is a multiple of it."""
    mlp: int = 256
    """Width of the text model's MLP."""
    vision_depth: int = 2
    """Layers of the vision tower."""
    vision_hidden: int = 64
    """Width of the vision tower."""
    vision_heads: int = 4
    """Heads of the vision tower; `model.tiny.vision_hidden` is a multiple of it."""
    vision_mlp: int = 128
    """Width of the vision tower's MLP."""
    vocab_rows: int = 640
    """Rows of the embedding and of the LM head; those above the tokenizer are spare, as in real checkpoints."""
    tie_embeddings: bool = False
    """Share one matrix between embedding and LM head."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    head_dim: int = 0
    """Width of a text head; 0 = hidden / heads. `qwen3_vl` only."""
    patch_size: int = 14
    """Side of a vision patch in pixels; a video token covers 2 x 2 patches."""
    deepstack: tuple[int, ...] = ()
    """Ascending vision layers whose features also enter the first text layers (DeepStack). `qwen3_vl` only."""
    full_attention: tuple[int, ...] = ()
    """Vision layers that attend over the whole frame; empty = the last one. `qwen2_5_vl` only."""
    embedding_std: float = 0.5
    """Standard deviation of the random embeddings. With tied embeddings and a wide model, 0.5 makes every choice
    certain.
    """

    def __post_init__(self) -> None:
        # Lists come from YAML.
        object.__setattr__(self, "deepstack", tuple(self.deepstack))
        object.__setattr__(self, "full_attention", tuple(self.full_attention))
        if not all(0 <= layer < self.vision_depth for layer in self.full_attention):
            raise ValueError(
                f"model.tiny.full_attention={list(self.full_attention)} must name vision layers below "
                f"model.tiny.vision_depth={self.vision_depth}"
            )
        if not 0 < self.embedding_std < math.inf:
            raise ValueError(f"model.tiny.embedding_std={self.embedding_std} must be a positive number")
        if self.model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"model.tiny.model_type={self.model_type!r} is not one of {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        foreign = (self.deepstack and not self.family.deepstack) or (self.head_dim and not self.family.own_head_dim)
        if foreign:
            others = [name for name, family in FAMILIES.items() if family.deepstack and family.own_head_dim]
            raise ValueError(
                f"model.tiny.deepstack={list(self.deepstack)}, model.tiny.head_dim={self.head_dim}: {self.model_type} has "
                f"neither; set model.tiny.model_type={' or '.join(others)} or leave them out"
            )
        sizes = ("hidden", "layers", "heads", "kv_heads", "mlp", "vision_depth", "vision_hidden", "vision_heads")
        for key in (*sizes, "vision_mlp", "vocab_rows", "patch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.tiny.{key}={getattr(self, key)} must be at least 1")
        if self.hidden % self.heads or self.heads % self.kv_heads or self.vision_hidden % self.vision_heads:
            raise ValueError(
                f"model.tiny.hidden={self.hidden} must be a multiple of model.tiny.heads={self.heads}, that of "
                f"model.tiny.kv_heads={self.kv_heads}, and model.tiny.vision_hidden={self.vision_hidden} of "
                f"model.tiny.vision_heads={self.vision_heads}"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"model.tiny.rope_theta={self.rope_theta} must be a positive number")
        distinct = sorted(set(self.deepstack)) == list(self.deepstack)
        if not distinct or not all(0 <= layer < self.vision_depth for layer in self.deepstack):
            raise ValueError(
                f"model.tiny.deepstack={list(self.deepstack)} must name ascending vision layers below "
                f"model.tiny.vision_depth={self.vision_depth}"
            )
        if self.deepstack and len(self.deepstack) >= self.layers:
            raise ValueError(
                f"model.tiny.deepstack={list(self.deepstack)}: every level needs a text layer behind the one it follows, "
                f"or no other token ever sees it; model.tiny.layers={self.layers} must be larger"
            )

    @property
    def token_side(self) -> int:
        """Pixels along one side of a video token."""
        return MERGE * self.patch_size

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


QWEN3_SPEC = TinySpec(model_type=QWEN3_VL.model_type, vision_depth=3, deepstack=(0, 1), rope_theta=5e6)
"""The tiny Qwen3-VL, two DeepStack levels from its first two vision layers."""

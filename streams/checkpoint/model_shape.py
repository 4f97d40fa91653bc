"""The shape of a checkpoint's model, as its config.json and the headers of its weights say it.

The driver plans memory from it before anything is loaded.

Invariants:
* importing and reading it loads neither torch nor transformers;
* sizes are those that the loaded modules have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streams.checkpoint.families import FAMILIES, Family
from streams.checkpoint.weights import ModelConfigFile, check_weights


def kv_values(layers: int, kv_heads: int, head_dim: int, *, unrotated: bool = False) -> int:
    """Return how many numbers one token keeps in the KV cache: keys and values of all layers.

    unrotated: its keys are kept before their rotation, too, as contiguous positions need them.
    """
    return (3 if unrotated else 2) * layers * kv_heads * head_dim


@dataclass(frozen=True)
class ModelGeometry:
    """Layers and widths.

    parameters: size of each, by the names of `model.named_parameters()` (a tied head is stored, and counted, once).
    """

    model_type: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    vision_layers: int
    vision_hidden: int
    vision_mlp: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    deepstack_levels: int
    parameters: dict[str, int]

    @classmethod
    def read(cls, checkpoint: Path) -> ModelGeometry:
        """Read a checkpoint folder. Raises ValueError that names what is missing in it (see `check_weights`)."""
        try:
            config = ModelConfigFile.read(checkpoint)
            parameters = check_weights(checkpoint).parameters
        except FileNotFoundError as error:
            raise ValueError(f"{checkpoint}: config.json or the weights' headers cannot be read: {error}") from error
        text, vision = config.text, config.vision
        heads = int(text["num_attention_heads"])
        return cls(
            model_type=config.model_type,
            layers=int(text["num_hidden_layers"]),
            hidden=int(text["hidden_size"]),
            mlp=int(text["intermediate_size"]),
            heads=heads,
            kv_heads=int(text["num_key_value_heads"] or heads),
            head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
            vocab=int(text["vocab_size"]),
            tied=config.tied,
            vision_layers=int(vision["depth"]),
            vision_hidden=int(vision["hidden_size"]),
            vision_mlp=int(vision["intermediate_size"]),
            patch_size=int(vision["patch_size"]),
            merge_size=int(vision["spatial_merge_size"]),
            temporal_patch_size=int(vision["temporal_patch_size"]),
            deepstack_levels=len(vision.get("deepstack_visual_indexes") or ()),
            parameters=parameters,
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def kv_values(self) -> int:
        """Numbers that one token keeps in the KV cache: keys and values of all layers."""
        return kv_values(self.layers, self.kv_heads, self.head_dim)

    @property
    def feature_width(self) -> int:
        """Numbers behind one video token: its embedding and all DeepStack levels."""
        return self.hidden * (1 + self.deepstack_levels)

    @property
    def pre_merger_width(self) -> int:
        """Numbers behind one video token before the mergers."""
        return self.merge_size**2 * self.vision_hidden * (1 + self.deepstack_levels)

    @property
    def token_side(self) -> int:
        """Pixels along one side of a video token."""
        return self.patch_size * self.merge_size

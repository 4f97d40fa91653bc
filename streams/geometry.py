"""The shape of a checkpoint's model, as its config.json and the headers of its weights say it.

Owner: streams. The driver plans memory from it before anything is loaded. Invariants: importing and reading it loads
neither torch nor transformers; sizes are those that the loaded modules have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from streams.freezing import parameter_name


@dataclass(frozen=True)
class ModelGeometry:
    """Layers and widths. parameters: numbers in the weights, by the names of `model.named_parameters()` (a tied head is
    stored, and counted, once).
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
        """From a checkpoint folder. Raises ValueError that names the folder and what is missing in it."""
        try:
            raw = json.loads((checkpoint / "config.json").read_text())
            # Checkpoints written before transformers 5 have the text model's keys at the top.
            text, vision = raw.get("text_config") or raw, raw["vision_config"]
            heads = int(text["num_attention_heads"])
            tied = bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
            return cls(
                model_type=str(raw["model_type"]),
                layers=int(text["num_hidden_layers"]),
                hidden=int(text["hidden_size"]),
                mlp=int(text["intermediate_size"]),
                heads=heads,
                kv_heads=int(text["num_key_value_heads"]),
                head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
                vocab=int(text["vocab_size"]),
                tied=tied,
                vision_layers=int(vision["depth"]),
                vision_hidden=int(vision["hidden_size"]),
                vision_mlp=int(vision["intermediate_size"]),
                patch_size=int(vision["patch_size"]),
                merge_size=int(vision.get("spatial_merge_size", 2)),
                temporal_patch_size=int(vision.get("temporal_patch_size", 2)),
                deepstack_levels=len(vision.get("deepstack_visual_indexes") or ()),
                parameters=_distinct(dict(_parameters(checkpoint)), tied),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint}: config.json or the weights' headers cannot be read: {error!r}") from error

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def kv_values(self) -> int:
        """Numbers that one token keeps in the KV cache: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

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


def _distinct(stored: dict[str, int], tied: bool) -> dict[str, int]:
    """Some files of a model with a tied head hold the embedding twice; it is loaded once."""
    return {name: size for name, size in stored.items() if not (tied and name == "lm_head.weight")}


def _parameters(checkpoint: Path) -> Iterator[tuple[str, int]]:
    """(name, size) of every tensor, from the headers of the safetensors files (8 bytes of length, then JSON)."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            "no *.safetensors; weights in *.bin files must be saved anew: load them with transformers, then save_pretrained"
        )
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield parameter_name(name), prod(tensor["shape"])

"""What differs between the model families that can be trained: the one place that knows Qwen2.5-VL from Qwen3-VL.

Invariants:
* light: importing it loads neither torch nor transformers;
* no other module compares a model type or a model's name: it asks `Family`;
* tensor names and shapes are those of transformers' own modules (`tests/streams/test_weights.py` compares them).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from streams.positions.mrope import QWEN2_5_VL_CONVENTION, QWEN3_VL_CONVENTION

Shapes = dict[str, tuple[int, ...]]

TEMPORAL_PATCH = 2
"""Frames that the vision tower joins into one patch, in every family."""
MERGE = 2
"""Patches along one side of a video token, in every family."""


@dataclass(frozen=True)
class Family:
    """What a model type means.

    Attributes:
        model_type: as `config.json` names it.
        word: what the names of its published checkpoints contain.
        convention: name of its rule for position ids.
        timestamps: time is text before every temporal patch, not position ids.
        mean, std: of its image processor, where a checkpoint does not carry its own.
        head_norms: queries and keys are normalised head by head.
        own_head_dim: heads may be wider than the hidden size divided among them.
        qkv_bias: queries, keys and values have a bias, the output projection has none. False: `attention_bias` of
            `config.json` decides for all four.
        deepstack: features of some vision layers go into the first text layers.
        interleaved: time, height and width take turns among the rotary frequencies. False: each has a range of its own.
        rotary_share: share of the rotary frequencies that height, and likewise width, has, as a fraction (above, below).
        text_tokens: added tokens of its tokenizer that are not special.
        flat_config: older files have the text model's keys at the top of `config.json`, and newer ones may say there
            whether the head is tied.
        names_rope_theta: a checkpoint must say its rotary base: releases of transformers differ on the default.
        renamed: (pattern, replacement) from the tensor names of its files to those of transformers' modules.
        defaults: what transformers takes for a key that a `config.json` leaves out, as far as shapes depend on it.
        tower: shapes of its vision tower, from `vision_config`.
    """

    model_type: str
    word: str
    convention: str
    timestamps: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    head_norms: bool
    own_head_dim: bool
    qkv_bias: bool
    deepstack: bool
    interleaved: bool
    rotary_share: tuple[int, int]
    text_tokens: tuple[str, ...]
    flat_config: bool
    names_rope_theta: bool
    renamed: tuple[tuple[str, str], ...]
    defaults: dict[str, dict[str, Any]]
    tower: Callable[[dict[str, Any]], Shapes]

    @property
    def token_side(self) -> int:
        """Pixels along one side of a video token, in its published checkpoints."""
        return MERGE * int(self.defaults["vision_config"]["patch_size"])

    def parameter_name(self, stored: str, expected: Container[str] = ()) -> str:
        """Return the parameter that transformers makes of a tensor in a safetensors file.

        expected: the model's names, for those of a bare model, which lack `model.` at the front or have one too many.
        """
        name = stored
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        if (bare := name.removeprefix("model.")) != name and bare in expected:
            return bare
        return f"model.{name}" if f"model.{name}" in expected else name


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int, *, bias: bool) -> Shapes:
    return {f"{name}.{part}": (width,) for part in (("weight", "bias") if bias else ("weight",))}


def _patch_embed(vision: dict[str, Any]) -> tuple[int, ...]:
    side = int(vision["patch_size"])
    return int(vision["hidden_size"]), int(vision["in_channels"]), int(vision["temporal_patch_size"]), side, side


def _blocks(vision: dict[str, Any], mlp: Shapes, *, norm_bias: bool) -> Shapes:
    width = int(vision["hidden_size"])
    block = _norm("norm1", width, bias=norm_bias) | _norm("norm2", width, bias=norm_bias) | mlp
    block |= _linear("attn.qkv", 3 * width, width) | _linear("attn.proj", width, width)
    return {f"blocks.{i}.{name}": shape for i in range(int(vision["depth"])) for name, shape in block.items()}


def _qwen2_5_tower(vision: dict[str, Any]) -> Shapes:
    width, mlp = int(vision["hidden_size"]), int(vision["intermediate_size"])
    merged = width * int(vision["spatial_merge_size"]) ** 2
    gated = _linear("mlp.gate_proj", mlp, width) | _linear("mlp.up_proj", mlp, width)
    return (
        {"patch_embed.proj.weight": _patch_embed(vision)}
        | _blocks(vision, gated | _linear("mlp.down_proj", width, mlp), norm_bias=False)
        | _norm("merger.ln_q", width, bias=False)
        | _linear("merger.mlp.0", merged, merged)
        | _linear("merger.mlp.2", int(vision["out_hidden_size"]), merged)
    )


def _qwen3_tower(vision: dict[str, Any]) -> Shapes:
    width, mlp = int(vision["hidden_size"]), int(vision["intermediate_size"])
    merged, out = width * int(vision["spatial_merge_size"]) ** 2, int(vision["out_hidden_size"])
    shapes: Shapes = {"patch_embed.proj.weight": _patch_embed(vision), "patch_embed.proj.bias": (width,)}
    shapes["pos_embed.weight"] = (int(vision["num_position_embeddings"]), width)
    shapes |= _blocks(
        vision, _linear("mlp.linear_fc1", mlp, width) | _linear("mlp.linear_fc2", width, mlp), norm_bias=True
    )
    mergers = {"merger": width}
    # DeepStack's mergers normalise after the patches of a token are joined, the last one before.
    mergers |= {f"deepstack_merger_list.{i}": merged for i in range(len(vision["deepstack_visual_indexes"] or ()))}
    for name, normalised in mergers.items():
        shapes |= _norm(f"{name}.norm", normalised, bias=True)
        shapes |= _linear(f"{name}.linear_fc1", merged, merged) | _linear(f"{name}.linear_fc2", out, merged)
    return shapes


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    word="Qwen2.5-VL",
    convention=QWEN2_5_VL_CONVENTION,
    timestamps=False,
    # The statistics of CLIP.
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    head_norms=False,
    own_head_dim=False,
    qkv_bias=True,
    deepstack=False,
    interleaved=False,
    rotary_share=(3, 8),
    text_tokens=(),
    flat_config=True,
    names_rope_theta=False,
    # Its files keep the names of its first release.
    renamed=((r"^visual", "model.visual"), (r"^model(?!\.(language_model|visual))", "model.language_model")),
    defaults={
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 3584,
            "intermediate_size": 3420,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "out_hidden_size": 3584,
        },
    },
    tower=_qwen2_5_tower,
)

QWEN3_VL = Family(
    model_type="qwen3_vl",
    word="Qwen3",
    convention=QWEN3_VL_CONVENTION,
    timestamps=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    head_norms=True,
    own_head_dim=True,
    qkv_bias=False,
    deepstack=True,
    interleaved=True,
    rotary_share=(5, 16),
    text_tokens=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    flat_config=False,
    names_rope_theta=True,
    renamed=(),
    defaults={
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "out_hidden_size": 3584,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": (8, 16, 24),
        },
    },
    tower=_qwen3_tower,
)

FAMILIES = {family.model_type: family for family in (QWEN2_5_VL, QWEN3_VL)}
SUPPORTED_MODEL_TYPES = tuple(FAMILIES)


def family_of_hub_id(name: str) -> Family:
    """Return the family that the id of a checkpoint which is not at hand sounds like; Qwen2.5-VL if it does not tell."""
    return next((family for family in FAMILIES.values() if family.word in name), QWEN2_5_VL)

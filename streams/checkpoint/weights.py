"""Whether a checkpoint folder holds the weights that its config.json asks for: by name, shape and dtype, before loading.

transformers fills a weight that is missing with random numbers and goes on; here that is an error, on every path that
loads a model. Invariants:
* importing and checking load neither torch nor transformers;
* names and shapes are those of transformers' own modules, and names in the files map to them as they do there
  (`tests/streams/test_weights.py` compares both with transformers).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from streams.checkpoint.families import FAMILIES, SUPPORTED_MODEL_TYPES, Family, Shapes
from streams.checkpoint.folder import PROCESSOR_FILES
from streams.checkpoint.weight_files import (
    StoredWeights,
    Tensor,
    check_json,
    check_no_pointer,
    listed,
    only_an_adapter,
    read_weight_files,
)

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_PARSED = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"),
    *PROCESSOR_FILES,
)
"""Files in JSON, each an object, that loading reads or an export copies."""
_TEXTS = (*_PARSED, "generation_config.json", "chat_template.jinja", "merges.txt")

_LEFTOVERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Buffers that older releases saved and transformers drops without a word."""


@dataclass(frozen=True)
class ModelConfigFile:
    """A config.json with transformers' defaults filled in. tied: the head is the embedding."""

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> ModelConfigFile:
        """Read a folder's config.json.

        Raises FileNotFoundError without one, ValueError if it is damaged, quantised or of an unsupported model type.
        """
        file = folder / "config.json"
        if not file.is_file():
            words = f"{folder}: no config.json there; give a checkpoint folder or a hub id"
            raise FileNotFoundError(only_an_adapter(folder) or words)
        check_no_pointer(file)
        try:
            raw = json.loads(file.read_text())
            model_type = str(raw["model_type"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): download it again") from error
        if model_type not in FAMILIES:
            raise ValueError(
                f"model.path={folder}: model type {model_type!r} is not supported "
                f"(supported: {', '.join(SUPPORTED_MODEL_TYPES)})"
            )
        if quantised := raw.get("quantization_config"):
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"{folder}: config.json has quantization_config ({method}): quantised weights cannot be trained; "
                "name the checkpoint in bfloat16 or float32 that it was made from"
            )
        family = FAMILIES[model_type]
        flat = raw if family.flat_config else {}
        text, vision = raw.get("text_config") or flat, raw.get("vision_config")
        if not isinstance(text, dict) or not text or not isinstance(vision, dict):
            raise ValueError(f"{file} has no text_config or no vision_config: this is no vision model")
        tied = raw.get("tie_word_embeddings") or (family.flat_config and text.get("tie_word_embeddings"))
        default = family.defaults
        return cls(model_type, default["text_config"] | text, default["vision_config"] | vision, bool(tied))

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


@dataclass(frozen=True)
class Weights:
    """A folder that passed its check.

    parameters: size of each, by the names of `model.named_parameters()` (a tied head counts once). warnings: what the
    folder holds and no model loads, for people.
    """

    parameters: dict[str, int]
    warnings: tuple[str, ...]


def check_weights(folder: Path) -> Weights:
    """Check a folder before it is loaded.

    Raises FileNotFoundError if it has no config.json or no weights, ValueError if it has no tokenizer, if a file is damaged,
    or if a tensor is missing, has another shape, or is quantised; each names what it is and what to do.
    """
    config = ModelConfigFile.read(folder)
    _check_small_files(folder)
    stored = read_weight_files(folder)
    try:
        expected = expected_shapes(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder / 'config.json'}: its sizes cannot be used: {error!r}") from error
    found = _by_parameter(folder, stored, config.family, expected)
    _compare(folder, config, expected, found)
    parameters = {name: prod(shape) for name, shape in expected.items() if not (config.tied and name == HEAD)}
    return Weights(parameters, tuple(_warnings(folder, config, stored, expected, found)))


def expected_shapes(config: ModelConfigFile) -> Shapes:
    """Shape of every tensor of the model's state dict, the head's also where it is tied."""
    text, vision = config.text, config.vision
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    shapes: Shapes = {EMBEDDING: (vocab, hidden), "model.language_model.norm.weight": (hidden,), HEAD: (vocab, hidden)}
    layer = _text_layer(config)
    for i in range(int(text["num_hidden_layers"])):
        shapes |= {f"model.language_model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {f"model.visual.{name}": shape for name, shape in config.family.tower(vision).items()}


def _text_layer(config: ModelConfigFile) -> Shapes:
    text, family = config.text, config.family
    hidden, mlp, heads = int(text["hidden_size"]), int(text["intermediate_size"]), int(text["num_attention_heads"])
    head = int(text.get("head_dim") or hidden // heads) if family.own_head_dim else hidden // heads
    width, kv_width = heads * head, int(text["num_key_value_heads"] or heads) * head
    shapes: Shapes = {
        "self_attn.q_proj.weight": (width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, width),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if family.head_norms:
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if family.qkv_bias or text["attention_bias"]:
        shapes |= {f"self_attn.{x}_proj.bias": (wide,) for x, wide in (("q", width), ("k", kv_width), ("v", kv_width))}
    if not family.qkv_bias and text["attention_bias"]:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    return shapes


def _check_small_files(folder: Path) -> None:
    """Raise ValueError for a text file that is not what its name says, or a missing tokenizer.

    transformers would silently make an empty tokenizer, and a pointer in place of a chat template would be exported.
    """
    present = {name for name in _TEXTS if (folder / name).is_file()}
    for name in sorted(present):
        check_no_pointer(folder / name)
        if name in _PARSED:
            check_json(folder / name)
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= present:
        raise ValueError(
            f"{folder} has no tokenizer (neither tokenizer.json nor vocab.json with merges.txt): copy the tokenizer's files "
            "from the model that it was trained from"
        )


def _by_parameter(folder: Path, stored: StoredWeights, family: Family, expected: Shapes) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in stored.tensors.items():
        parameter = family.parameter_name(name, expected)
        if parameter in found:
            raise ValueError(
                f"{folder}: {origin[parameter]} and {name} both hold the weight {parameter}: keep one of them in the files"
            )
        found[parameter], origin[parameter] = tensor, name
    return found


def _compare(folder: Path, config: ModelConfigFile, expected: Shapes, found: dict[str, Tensor]) -> None:
    """Raise ValueError for weights that are missing, have another shape, or are not floating point."""
    missing = expected.keys() - found.keys()
    if config.tied and missing & {EMBEDDING, HEAD} != {EMBEDDING, HEAD}:
        missing -= {EMBEDDING, HEAD}  # transformers ties in both directions
    shapes = {
        name: f"{list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    }
    odd = {name: found[name].dtype for name in expected if name in found and found[name].dtype not in FLOATS}
    if not missing and not shapes and not odd:
        return
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} weights are missing: {summary(missing, expected)}")
        if strangers := _strangers(expected, found):
            problems.append(f"the files hold {len(strangers)} others instead: {summary(strangers)}")
        if missing == {HEAD}:
            problems.append("tie_word_embeddings=true is what config.json says where the head is the embedding")
    if shapes:
        groups: dict[str, list[str]] = {}
        for name, words in shapes.items():
            groups.setdefault(words, []).append(name)
        wrong = [f"{summary(names)} {words}" for words, names in groups.items()]
        problems.append(f"{len(shapes)} weights have another shape: {listed(wrong)}")
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        problems.append(f"{len(odd)} weights are quantised ({kinds}): {summary(odd)}")
    raise ValueError(
        f"{folder}: the weights are not those that its config.json describes. {'; '.join(problems)}. "
        "Weights that are not there would start from random numbers: download the checkpoint again, or name the one that "
        "this was made from (an adapter must be merged first)"
    )


def _strangers(expected: Shapes, found: dict[str, Tensor]) -> list[str]:
    return [name for name in found if name not in expected and not _LEFTOVERS.search(name)]


def _warnings(
    folder: Path, config: ModelConfigFile, stored: StoredWeights, expected: Shapes, found: dict[str, Tensor]
) -> Iterable[str]:
    parts = []
    if strangers := _strangers(expected, found):
        parts.append(f"{len(strangers)} tensors that the model of config.json does not have ({summary(strangers)})")
    if stored.unused:
        parts.append(f"files that are not loaded ({listed(list(stored.unused))})")
    if parts:
        adapter = any("adapter" in name for name in stored.unused)
        hint = "; an adapter is not applied: merge it first if it is meant to be" if adapter else ""
        yield f"{folder} also holds {' and '.join(parts)}: they are left out{hint}"
    if not any((folder / name).is_file() for name in PROCESSOR_FILES[:3]):
        family = config.family
        yield (
            f"{folder} has no {PROCESSOR_FILES[0]}: frames are normalised as {config.model_type} does by default "
            f"(image_mean={list(family.mean)}, image_std={list(family.std)})"
        )


def summary(names: Iterable[str], whole: Iterable[str] = ()) -> str:
    """Names for people: a module of which everything in `whole` is meant as one entry, layers alike as a range."""
    meant = set(names)
    size = Counter(prefix for name in whole for prefix in _prefixes(name))
    here = Counter(prefix for name in meant for prefix in _prefixes(name))
    entries: dict[str, str] = {}
    for name in meant:
        full = next((p for p in _prefixes(name) if here[p] > 1 and here[p] == size[p]), None)
        entries[full or name] = f" ({here[full]} tensors)" if full else ""
    alike: dict[tuple[str, str], list[int]] = {}
    for entry, count in entries.items():
        number = re.search(r"(?<=\.)\d+(?=\.|$)", entry)
        pattern = f"{entry[: number.start()]}#{entry[number.end() :]}" if number else entry
        alike.setdefault((pattern, count), []).append(int(number[0]) if number else -1)
    return listed(
        [pattern.replace("#", _ranges(numbers)) + count for (pattern, count), numbers in sorted(alike.items())]
    )


def _prefixes(name: str) -> list[str]:
    """Modules around a tensor, the outermost first; the whole model is none of them."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(2, len(parts))]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as {0-2,5}; a single one as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return words if len(numbers) == 1 else f"{{{words}}}"

"""Checkpoints of a tiny model, whole or with something wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec

SPECS = {
    "qwen2_5_vl": TinySpec(hidden=64, layers=3, mlp=96),
    "qwen2_5_vl tied": TinySpec(hidden=64, layers=2, mlp=96, tie_embeddings=True),
    "qwen3_vl": replace(QWEN3_SPEC, hidden=64, layers=3, mlp=96),
    "qwen3_vl tied": replace(QWEN3_SPEC, hidden=64, layers=3, mlp=96, head_dim=48, tie_embeddings=True),
}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0123456789abcdef' * 4}\nsize 3968000000\n"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    tensors = load_file(folder / WHOLE)
    save_file(change(tensors), folder / WHOLE, metadata={"format": "pt"})
    return folder


def without(folder: Path, *words: str) -> Path:
    """Drop every tensor whose name contains one of the words."""
    return rewrite(folder, lambda held: {k: v for k, v in held.items() if not any(word in k for word in words)})


def configured(folder: Path, **changes: object) -> Path:
    """Change config.json: `text_config__vocab_size=7` is a nested key."""
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        place = raw
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def sharded(folder: Path, *, parts: int = 2) -> tuple[Path, list[str]]:
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names, where = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)], {}
    for i, name in enumerate(names):
        own = dict(sorted(tensors.items())[i::parts])
        save_file(own, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return folder, names


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)

"""Which files of a checkpoint folder hold its weights, and which tensors they hold, from their headers alone.

Invariants:
* importing it and reading with it load neither torch nor transformers, and no tensor;
* the files are those that transformers loads: `model.safetensors`, or else those of its index; nothing else counts;
* a file that is not whole is an error that names it and what to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")
_SHOWN = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor as a header describes it. dtype: as safetensors writes it, such as `BF16`."""

    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclass(frozen=True)
class StoredWeights:
    """What a folder holds.

    tensors: by the names in the files. unused: names of the weight files in the folder that nothing loads.
    """

    tensors: dict[str, Tensor]
    unused: tuple[str, ...]


def read_weight_files(folder: Path) -> StoredWeights:
    """Return the tensors that loading the folder would load.

    Raises FileNotFoundError if it holds no weights in safetensors files, ValueError that names the file for one that is
    missing, damaged, or not what the index says.
    """
    if (folder / ADAPTER_CONFIG).is_file() and (words := only_an_adapter(folder)):
        # Where peft is installed, transformers would load the adapter's base model in place of what lies here.
        raise ValueError(words)
    indexed: dict[str, str] = {}
    if (folder / WHOLE).is_file():
        files = [WHOLE]
    elif (folder / INDEX).is_file():
        indexed = _read_index(folder / INDEX)
        files = sorted(set(indexed.values()))
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder}: {len(missing)} of the {len(files)} files that {INDEX} names are missing: {listed(missing)}. "
                "Download the checkpoint again"
            )
    else:
        raise FileNotFoundError(_without_weights(folder))
    tensors: dict[str, Tensor] = {}
    for name in files:
        for key, tensor in _read_header(folder, name).items():
            if key in tensors:
                raise ValueError(f"{folder}: both {tensors[key].file} and {name} hold {key}: keep it in one of them")
            tensors[key] = tensor
    wrong = {key: name for key, name in indexed.items() if key not in tensors or tensors[key].file != name}
    if wrong:
        raise ValueError(
            f"{folder / INDEX} says that {listed(sorted(set(wrong.values())))} hold {listed(sorted(wrong))}, which they do "
            "not: download the checkpoint again, index and files of one release"
        )
    unused = {path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)} - set(files)
    return StoredWeights(tensors, tuple(sorted(unused)))


def check_no_pointer(file: Path) -> None:
    """Refuse a file of which only Git LFS's pointer was downloaded. Raises ValueError."""
    with file.open("rb") as opened:
        start = opened.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(
            f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}, or download the "
            "checkpoint again"
        )


def check_json(file: Path) -> None:
    """Refuse a file that is no JSON object: cut short, empty, a page of HTML. Raises ValueError."""
    try:
        if not isinstance(json.loads(file.read_bytes()), dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({file.stat().st_size:,} bytes; {error}): download it again") from error


def listed(names: list[str]) -> str:
    """The names, the first few of them if they are many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _read_index(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    check_no_pointer(index)
    try:
        whole = json.loads(index.read_text())
        weight_map, _ = whole["weight_map"], whole["metadata"]  # transformers reads both
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): download it again") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(
            f"{index} is damaged: its weight_map must give a file name for every tensor: download it again"
        )
    return weight_map


def _read_header(folder: Path, name: str) -> dict[str, Tensor]:
    file = folder / name
    check_no_pointer(file)
    size = file.stat().st_size
    if not size:
        raise ValueError(f"{file} is empty (0 bytes): download it again")
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
            return {key: Tensor(tuple(s.get_shape()), s.get_dtype(), name) for key, s in slices.items()}
    except SafetensorError as error:
        # safetensors compares the length of the file with what the header promises.
        what = "is truncated or damaged" if "not fully covered" in str(error) else "is damaged, or no safetensors file"
        raise ValueError(f"{file} {what} ({size:,} bytes; {error}): download it again") from error


def only_an_adapter(folder: Path) -> str:
    """Say what to do with a folder that holds an adapter instead of a model; empty for any other."""
    names = [path.name for path in folder.glob("adapter_model.*")]
    if not names and not (folder / ADAPTER_CONFIG).is_file():
        return ""
    return (
        f"{folder} holds an adapter ({ADAPTER_CONFIG}), not a model: merge it into its base model (peft: merge_and_unload, "
        "then save_pretrained) and name that folder"
    )


def _without_weights(folder: Path) -> str:
    if words := only_an_adapter(folder):
        return words
    names = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder} holds {listed(names)}, but neither {WHOLE} nor {INDEX}: download the checkpoint again"
    if names:
        return (
            f"{folder}: no *.safetensors but {listed(names)}: such files can run code when they are loaded, and are not. Save "
            "the weights anew where you trust them: load them with transformers, then save_pretrained"
        )
    return f"{folder} holds no weights (neither {WHOLE} nor {INDEX}): download the checkpoint again"

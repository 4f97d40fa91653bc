"""A checkpoint before it is loaded: its processor files, and what its folder says.

Invariants:
* importing it loads neither torch nor transformers: the driver reads this much of a checkpoint;
* a folder that would be read in another way than it was written is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.checkpoint.families import FAMILIES, MERGE, Family

STREAMING_FILE = "streaming.json"
"""How an exported checkpoint must be run; see conf.streaming."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


@dataclass(frozen=True)
class ImageSpec:
    """How frames become patches: patch and merge sizes in pixels / patches, per-channel mean and std of [0, 1] values."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def load(cls, processors: dict[str, bytes], vision_config: Any, family: Family) -> ImageSpec:
        """Make it from a checkpoint's processor files; mean and std default to those of the family's processor."""
        found: dict[str, Any] = {}
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            found = _parsed(processors, name) | found
        # transformers 5 writes all processors of a model into one file.
        together = _parsed(processors, "processor_config.json")
        for name in ("image_processor", "video_processor"):
            found = (together.get(name) or {}) | found
        return cls(
            patch_size=vision_config.patch_size,
            merge_size=vision_config.spatial_merge_size,
            temporal_patch_size=vision_config.temporal_patch_size,
            mean=tuple(found.get("image_mean", family.mean)),
            std=tuple(found.get("image_std", family.std)),
        )


def _parsed(processors: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(processors.get(name, b"{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint's {name} is damaged: {error}") from error


def read_processors(checkpoint: Path) -> dict[str, bytes]:
    """Return the content of a checkpoint's processor files, by name."""
    return {name: (checkpoint / name).read_bytes() for name in PROCESSOR_FILES if (checkpoint / name).is_file()}


def check_image_statistics(checkpoint: Path, image: ImageSpec) -> None:
    """Raise ValueError for an export whose processor files were lost or changed: its pixels would be normalised wrongly."""
    file = checkpoint / STREAMING_FILE
    try:
        saved = dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for name, value in (("image_mean", image.mean), ("image_std", image.std)):
        if saved.get(name, list(value)) != list(value):
            raise ValueError(
                f"{checkpoint}: {STREAMING_FILE} says that it was trained with {name}={saved[name]}, but its processor "
                f"files say {list(value)} (the family's default if they are missing): put its {PROCESSOR_FILES[0]} back"
            )


def model_type(checkpoint: Path) -> str:
    """Return the model type in a folder's config.json, '' if there is none. Raises ValueError if it is damaged."""
    return str(_config(checkpoint).get("model_type", ""))


def token_side(checkpoint: Path) -> int:
    """Return the pixels along one side of a video token: patch size times merge size, from a folder's config.json."""
    vision = _config(checkpoint).get("vision_config")
    if not isinstance(vision, dict) or "patch_size" not in vision:
        raise ValueError(
            f"model.path={checkpoint}: config.json has no vision_config.patch_size: this is no vision model"
        )
    return int(vision["patch_size"]) * int(vision.get("spatial_merge_size", MERGE))


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoint / "config.json").read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.path={checkpoint}: config.json is damaged: {error}") from error


def check_rope_theta(checkpoint: Path) -> None:
    """Raise ValueError for a checkpoint without a rotary base if releases of transformers differ on the default."""
    config = json.loads((checkpoint / "config.json").read_text())
    if not FAMILIES[config["model_type"]].names_rope_theta:
        return
    text = config.get("text_config") or {}
    named = [text, text.get("rope_parameters") or {}, text.get("rope_scaling") or {}]
    if not any(isinstance(place.get("rope_theta"), int | float) for place in named):
        raise ValueError(
            f"model.path={checkpoint}: config.json has no text_config.rope_theta, which transformers then takes for "
            "5,000,000 or 500,000, depending on its release; write the value the checkpoint was trained with"
        )


def check_no_dropout(checkpoint: Path) -> None:
    """Raise ValueError for a checkpoint with dropout: the learner could not reproduce the sampled log-probs."""
    config = json.loads((checkpoint / "config.json").read_text())
    parts = {
        "": config,
        "text_config.": config.get("text_config") or {},
        "vision_config.": config.get("vision_config") or {},
    }
    for prefix, part in parts.items():
        for key, value in part.items():
            if key.endswith(("dropout", "drop_rate")) and value:
                raise ValueError(
                    f"model.path={checkpoint}: config.json has {prefix}{key}={value}; set it to 0, training needs the very "
                    "log-probs that were sampled"
                )


def is_hub_id(path: str) -> bool:
    """Return whether a path that is no folder has the form of a hub id, owner/name."""
    return not path.startswith((".", "/", "~")) and path.count("/") == 1


def resolve_checkpoint(path: str, key: str = "model.path") -> Path:
    """Return a local folder as it is, or a hub id's folder in the hub's cache (downloads on first use).

    key: what named it, for messages. Raises FileNotFoundError for what is neither, or a hub id that cannot be had.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if not is_hub_id(path):
        raise FileNotFoundError(f"{key}={path}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path))
    except (OSError, HFValidationError) as error:  # also what the hub answers, and what is not there while offline
        raise FileNotFoundError(
            f"{key}={path}: no such folder, and the hub gives no model of that name: "
            f"{str(error).strip().splitlines()[0]} Check the name and the connection, log in (`hf auth login`) for a model "
            "that needs it, or name a folder"
        ) from error

"""streaming.json: how a checkpoint must be run, and what happens if the configuration differs.

Written into every exported checkpoint; read by evaluation, watch, and RL that starts from a folder.

Invariants:
* the checkpoint's value is used unless the command line overrides that key;
* an override is used with a warning that names both values (an error where a stage is resumed).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from streams.checkpoint.folder import STREAMING_FILE
from streams.layout.layout import LayoutConfig
from streams.memory import CUSTOM, MemoryConfig

FORMAT = 1

_FIELDS = {
    "chunk_seconds": "data.video.chunk_seconds",
    "max_chunks": "data.video.max_chunks",
    "frames_per_chunk": "data.video.frames_per_chunk",
    "min_pixels": "data.video.min_pixels",
    "max_pixels": "data.video.max_pixels",
    "score_temperature": "rollout.temperature",
}
_SECTIONS = {"layout": LayoutConfig, "memory": MemoryConfig}


@dataclass(frozen=True)
class Applied:
    """The configuration to use, the keys taken from the checkpoint, and the overrides that contradict it."""

    config: RunConfig
    taken: tuple[str, ...]
    conflicts: tuple[str, ...]


def streaming_settings(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint of this run must be run with."""
    values: dict[str, Any] = {name: _get(config, key) for name, key in _FIELDS.items()}
    return {"format": FORMAT} | values | {name: asdict(_get(config, name)) for name in _SECTIONS}


def read_streaming(checkpoint: Path) -> dict[str, Any]:
    """Return config key -> value of a checkpoint folder, {} without streaming.json. Raises ValueError for a damaged one."""
    file = checkpoint / STREAMING_FILE
    if not file.is_file():
        return {}
    try:
        saved = json.loads(file.read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']} is not {FORMAT}, the one this version reads")
        values = {key: saved[name] for name, key in _FIELDS.items() if name in saved}
        for name, section in _SECTIONS.items():
            # A key that is newer than the checkpoint: the code then did what its default does now.
            given = asdict(section()) | saved[name] if name in saved else {}
            values |= {f"{name}.{key}": value for key, value in given.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    return values


def apply_streaming(config: RunConfig, saved: dict[str, Any], overridden: Collection[str]) -> Applied:
    """Apply a checkpoint's settings to the configuration.

    overridden: keys (or groups, as `memory`) set on the command line. Single names of a mapping (`memory.args`) may be
    overridden, too; the others stay the checkpoint's.
    Raises ValueError if the checkpoint's settings cannot be used, or not with the overrides.
    """
    taken: list[str] = []
    conflicts: list[str] = []
    changes: dict[str, Any] = {}
    named = config.memory.name if _overrides(overridden, "memory.name") else saved.get("memory.name")
    if named != CUSTOM:
        # The checkpoint's policy belongs to its name. (One that was named but not chosen was never used.)
        saved = {key: value for key, value in saved.items() if key not in ("memory.target", "memory.args")}
    for key, value in sorted(saved.items()):
        try:
            now = _get(config, key)
        except AttributeError:
            continue  # a setting of another version of this program
        whole = _overrides(overridden, key)
        names = {word.removeprefix(f"{key}.").partition(".")[0] for word in overridden if word.startswith(f"{key}.")}
        parts = {key: (now, value, whole)}
        if names and not whole:
            parts = {
                f"{key}.{name}": (now.get(name), value.get(name), name in names) for name in sorted({*now, *value})
            }
            value = value | {name: now[name] for name in names & now.keys()}
        for part, (mine, its, overrides) in parts.items():
            if mine != its:
                if overrides:
                    conflicts.append(f"{part}={mine!r} (the checkpoint was made with {its!r})")
                else:
                    taken.append(f"{part}={its!r}")
        if not whole and now != value:
            changes[key] = value
    try:
        return Applied(_replaced(config, changes), tuple(taken), tuple(conflicts))
    except ValueError as error:
        raise ValueError(f"{error} (what the checkpoint's {STREAMING_FILE} says: {', '.join(taken)})") from error


def _overrides(overridden: Collection[str], key: str) -> bool:
    """Return whether a key is set on the command line, by itself or with the group around it."""
    return any(f"{key}.".startswith(f"{word}.") for word in overridden)


def overridden_keys(overrides: Collection[str]) -> frozenset[str]:
    """Return the keys and groups that command-line overrides set."""
    return frozenset(text.partition("=")[0].lstrip("+~").partition("@")[0] for text in overrides)


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _replaced(node: Any, changes: dict[str, Any]) -> Any:
    """Return nested dataclasses with dotted keys replaced; validation runs on whole sections, not key by key."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    own |= {head: _replaced(getattr(node, head), below) for head, below in nested.items()}
    return dataclasses.replace(node, **own)

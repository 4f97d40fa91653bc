"""The keys of the configuration that are paths, the one place where `~` in them is expanded, and where options are found.

Invariant: code that gets a loaded configuration expands nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from streams.support.files import PROJECT
from streams.support.paths import expand_home

GROUPS = PROJECT / "conf"
"""The Hydra groups, in a checkout as in an installed wheel."""

PATH_KEYS = (
    "run_root",
    "resume",
    "data.train",
    "data.heldout",
    "data.root",
    "model.path",
    "algorithm.init",
    "algorithm.reference",
    "eval.checkpoint",
    "watch.video",
    "tracking.uri",
)
"""Among them tracking.uri: it is a path if it names a local store (a plain path, `file:` or `sqlite:///`)."""

_LOCAL_STORE = re.compile(r"(sqlite:///|file:(?://)?/?)?(~.*)", re.DOTALL)


def with_home(key: str, value: Any) -> Any:
    """Return the value of a configuration key with `~` expanded; unchanged if the key is no path. Raises ValueError."""
    if key not in PATH_KEYS or not isinstance(value, str):
        return value
    try:
        if key == "tracking.uri":
            return _local_store(value)
        return expand_home(value)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from None


def expand_homes(config: DictConfig) -> None:
    """Expand `~` in every path of a merged configuration, in place. Raises ValueError with the key."""
    for key in PATH_KEYS:
        given = OmegaConf.select(config, key)
        if (expanded := with_home(key, given)) != given:
            OmegaConf.update(config, key, expanded)


def group_options(group: str, typed: Sequence[str]) -> list[str]:
    """Return the sorted names of a group's options: Sightline's own, and those of a --config-dir among the typed words."""
    folders = [GROUPS, *_config_dirs(typed)]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _config_dirs(typed: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(typed, [*typed[1:], ""], strict=True):
        if word in ("--config-dir", "-cd"):
            yield Path(following)
        elif word.startswith("--config-dir="):
            yield Path(word.partition("=")[2])


def _local_store(uri: str) -> str:
    found = _LOCAL_STORE.fullmatch(uri)
    if found is None:
        return uri
    scheme, path = found[1] or "", expand_home(found[2])
    return f"file://{path}" if scheme.startswith("file:") else f"{scheme}{path}"

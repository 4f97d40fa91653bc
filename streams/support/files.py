"""Files that are written aside and renamed: a reader finds the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from streams.support.strict_json import dumps

PROJECT = Path(__file__).resolve().parent.parent.parent
"""The folder that holds our packages: the checkout, or `sightline` in site-packages."""
PACKAGES = ("streams", "rollout", "learner", "rewards", "sft", "rl", "evals", "runtime", "conf")
"""All of them: what a wheel holds, what a cluster's workers are sent, what must be equal on all nodes."""
MODULES_VARIABLE = "SIGHTLINE_MODULES"
"""Environment variable: the folder of the user's own modules. The `sightline` command sets it."""


def write_atomic(path: Path, text: str) -> None:
    """Written aside, renamed: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(encoded(text))
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def encoded(text: str) -> bytes:
    """UTF-8. Half a surrogate pair, which JSON rows may hold, stays the escape that JSON reads it from."""
    return text.encode("utf-8", errors="backslashreplace")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Strict JSON: a number that is not finite is null, there as everywhere "not measured"."""
    write_atomic(path, dumps(values, indent=2) + "\n")

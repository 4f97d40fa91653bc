"""Files as a whole: what they hold, and replacing one so that a reader finds the old or the new one."""

from __future__ import annotations

import hashlib
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


def digest(path: Path) -> str:
    """Return what tells a file's contents from others: 32 hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write the text aside and rename it to `path`; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(encoded(text))
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def encoded(text: str) -> bytes:
    """Return the text in UTF-8. A lone surrogate, which JSON rows may contain, becomes the JSON escape that it came from."""
    return text.encode("utf-8", errors="backslashreplace")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write strict JSON. A number that is not finite becomes null, which everywhere means "not measured"."""
    write_atomic(path, dumps(values, indent=2) + "\n")

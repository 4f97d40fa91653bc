"""The folder of one job of a sweep (`-m KEY=A,B`): below run_root, named by the values that the sweep varies.

Pure but for `forget_record`. Invariants:
* Two jobs of a sweep never share a folder.
* A job's folder does not depend on the other jobs: a sweep that is typed again, with more values too, goes on where it stood.
* No password is part of a name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from streams.support.redact import public_setting

LONGEST = 100
"""Characters of a folder's name; what is longer is cut."""
_ODD = re.compile(r"[^\w.@+-]+")
"""What a folder's name does without: it would need quotes in a shell or on a command line of Hydra."""


def sweep_root(run_root: str, typed: Sequence[str], params: Mapping[str, str], overrides: Sequence[str]) -> str:
    """Return the run_root of one job of a sweep: `run_root/KEY-VALUE+KEY-VALUE`, or as it is if the sweep varies run_root.

    typed: the words of the command line, options and `model=` rewritten. params: hydra.sweeper.params, which may vary keys,
    too. overrides: the words of this job.
    """
    words = [word for word in typed if "=" in word and not word.startswith("-")]
    asked = _parsed([*words, *(f"{key}={values}" for key, values in params.items())])
    varied = {override.get_key_element() for override in asked if override.is_sweep_override()}
    if "run_root" in varied:
        return run_root
    own = {override.get_key_element(): override for override in _parsed(overrides)}
    parts = [_part(key, own[key].get_value_element_as_str()) for key in sorted(varied & own.keys())]
    return str(Path(run_root, "+".join(parts))) if parts else run_root


def forget_record(folder: str) -> None:
    """Remove Hydra's multirun.yaml: it holds addresses with their passwords. Every job writes its own settings, without."""
    (Path(folder) / "multirun.yaml").unlink(missing_ok=True)


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def _part(key: str, value: str) -> str:
    """Return `KEY-VALUE`, with a digest of what was meant where that had to be changed."""
    bare = key.lstrip("+~")
    plain = f"{bare}-{value}"
    name = _ODD.sub("-", f"{bare}-{public_setting(bare, value)}")[:LONGEST]
    return name if name == plain else f"{name}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"

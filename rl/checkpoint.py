"""Checkpoints: atomic directories with everything a stage made.

Owner: rl. Layout of one: `hf/` (an exported checkpoint that `from_pretrained` loads, with tokenizer, processors, chat
template and streaming.json), `deepspeed/` (model and optimiser state), `state.json` (version, step, consumed ids).
Invariant: a directory under its final name is complete; it is written aside, flushed, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

STATE_FILE = "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """Where a stage stood: learner version, optimiser steps, and the ids of all groups trained so far."""

    stage: str
    version: int
    step: int
    consumed: tuple[str, ...]


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it is complete; leftovers of a crash are cleared."""
    partial = final.with_name(final.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, final: Path, state: CheckpointState) -> None:
    """Add the state, flush everything to disk and rename into place (an older checkpoint of that name goes)."""
    (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")
    for path in partial.rglob("*"):
        if path.is_file():
            _flush(path)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        # A crash may have come between setting an older one aside and deleting it.
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(partial, final)
    _flush(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def read_state(path: Path) -> CheckpointState:
    """The state of a complete checkpoint. Raises FileNotFoundError or ValueError that names the file."""
    file = path / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no {STATE_FILE}")
    try:
        values = json.loads(file.read_text())
        return CheckpointState(**(values | {"consumed": tuple(values["consumed"])}))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps under `folder`, or None."""
    complete = [path.parent for path in folder.glob(f"*/{STATE_FILE}") if path.parent.suffix == ""]
    return max(complete, key=lambda path: read_state(path).step, default=None)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Checkpoints: directories with everything a stage made, completed by a rename, verified, and found again by a resume.

Layout of one: `hf/` (an exported checkpoint that `from_pretrained` loads, with tokenizer, processors, chat
template and streaming.json), `deepspeed/` (model, optimiser, scheduler and RNG state), `rollouts/` (finished groups, if
they are kept), `state.json` (CheckpointState), `files.json` (size and CRC of every file).

Invariants:
* a directory under its final name is complete: it is written aside, flushed, and renamed;
* what is read back is checked against `files.json` first.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.store.ranges import Pairs, Ranges
from streams.support.strict_json import dumps, loads

STATE_FILE = "state.json"
FILES_FILE = "files.json"
OPTIMIZER_FOLDER = "deepspeed"
ASIDE = (".partial", ".replaced", ".undone")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Groups:
    """Some groups of a stage, see runtime.task_order.

    Attributes:
        ranges: by their places in the stage's order; first and last, both included.
        names: ids of those that have no place in it, since their rows are not there (any more); in checkpoints of earlier
            versions, of all.
    """

    ranges: Pairs = ()
    names: tuple[str, ...] = ()

    @classmethod
    def read(cls, value: Any) -> Groups:
        """Return what was written. Raises TypeError or ValueError for anything else."""
        if isinstance(value, list):
            return cls(names=tuple(value))
        ranges = Ranges(value["ranges"])
        return cls(ranges.pairs, tuple(value["names"]))


@dataclass(frozen=True)
class CheckpointState:
    """The progress of a stage. It does not grow with the number of steps.

    Attributes:
        stage: its name.
        version: version of the learner's weights.
        step: optimiser steps.
        consumed: all groups trained so far.
        dropped: groups that were given up.
        rows, seed: what decides about the order of the groups: ids of the stage's tasks, and the run's seed.
        group_size: streams of a group. Part of the format of `state.json`; this code does not read it.
        counters: the stage's result so far.
        tracking_run: id of the MLflow run.
        settings: what the stage runs under (see runtime.store.manifests); {} if that was not recorded.
    """

    stage: str
    version: int
    step: int
    consumed: Groups = Groups()
    dropped: Groups = Groups()
    rows: tuple[str, ...] = ()
    seed: int = 0
    group_size: int = 1
    counters: dict[str, Any] = field(default_factory=dict)
    tracking_run: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A checkpoint that passed its check. resumable: it has optimiser state, which was checked, too."""

    path: Path
    state: CheckpointState
    resumable: bool = False


def step_name(step: int) -> str:
    return f"step{step:06d}"


def partial_path(final: Path) -> Path:
    """Make the empty folder in which `final` is written; leftovers of a crash are deleted."""
    partial = final.with_name(final.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, final: Path, state: CheckpointState) -> None:
    """Add state and checksums, flush everything to disk, and rename into place, which replaces one of that name."""
    (partial / STATE_FILE).write_text(dumps(asdict(state), keep=True, indent=1) + "\n")
    files = {
        str(path.relative_to(partial)): _flush_and_sum(path) for path in sorted(partial.rglob("*")) if path.is_file()
    }
    (partial / FILES_FILE).write_text(json.dumps(files, indent=1) + "\n")
    _flush(partial / FILES_FILE)
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
    """Return the state of a complete checkpoint. Raises FileNotFoundError or ValueError that names the file."""
    file = path / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no {STATE_FILE}")
    try:
        values = loads(file.read_text())
        sets = {key: Groups.read(values.get(key, [])) for key in ("consumed", "dropped")}
        if "consumed" not in values:
            raise KeyError("consumed")
        state = CheckpointState(**(values | sets | {"rows": tuple(values.get("rows", ()))}))
        _check_types(state)
        return state
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _check_types(state: CheckpointState) -> None:
    default = CheckpointState("", 0, 0)
    for field_ in fields(state):
        value, kind = getattr(state, field_.name), type(getattr(default, field_.name))
        if type(value) is not kind:
            raise TypeError(f"{field_.name}={value!r} is no {kind.__name__}")
    if not all(isinstance(row, str) for row in state.rows):
        raise TypeError("rows are no texts")


def verify(path: Path) -> Found:
    """Check every file against its size and CRC. Raises ValueError or FileNotFoundError that names what is wrong."""
    listing = path / FILES_FILE
    if not listing.is_file():
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no {FILES_FILE}")
    try:
        files = json.loads(listing.read_text())
        expected = {name: (int(size), int(crc)) for name, (size, crc) in files.items()}
        if STATE_FILE not in expected:
            raise KeyError(STATE_FILE)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{listing} is damaged: {type(error).__name__}: {error}") from error
    for name, (size, crc) in expected.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, {size} were written")
        if _crc(file) != crc:
            raise ValueError(f"{file} is not what was written (its checksum differs)")
    # By the listing, not by the files: a crash may have left some of an optimiser state that was being dropped.
    return Found(path, read_state(path), any(name.startswith(OPTIMIZER_FOLDER + os.sep) for name in expected))


def newest_usable(folder: Path, say: Callable[[str], None]) -> Found | None:
    """Return the checkpoint with the most steps under `folder` that passes its check; those that fail are reported by `say`.

    A checkpoint that was set aside for a successor is renamed back if the successor was never completed.
    """
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if path.suffix == ".partial":
            say(f"checkpoint {path} was not finished and is left out")
        elif path.suffix == ".replaced" and not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))
    for path in by_age(folder):
        try:
            return verify(path)
        except (ValueError, OSError) as error:
            say(f"checkpoint {path} cannot be used, trying the one before: {error}")
    return None


def by_age(folder: Path) -> list[Path]:
    """Return the directories under their final names, most steps first."""
    steps = [
        (_step_of(path), path.name, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and path.suffix not in ASIDE and path.name != "best"
    ]
    return [path for *_, path in sorted(steps, reverse=True)]


def _step_of(path: Path) -> int:
    try:
        return read_state(path).step
    except (ValueError, OSError):
        # It may be the newest one, damaged: its name has the step.
        digits = path.name.removeprefix("step")
        return int(digits) if digits.isdigit() else 1 << 62


def prune(folder: Path, keep: int, optimizer: str, protect: Collection[str] = ()) -> list[str]:
    """Delete all but the newest `keep` checkpoints and the names in `protect`. Returns the names deleted.

    optimizer: `all` keeps the optimiser state of each, `latest` of the newest only.
    """
    deleted = []
    for place, path in enumerate(by_age(folder)):
        if place >= keep and path.name not in protect:
            shutil.rmtree(path)
            deleted.append(path.name)
        elif place and optimizer == "latest" and (path / OPTIMIZER_FOLDER).is_dir():
            _drop_optimizer(path)
    return deleted


def set_aside_after(folder: Path, step: int) -> list[str]:
    """Rename checkpoints of steps after `step`, to which a stage goes back. Returns their new names.

    Damaged ones are renamed, too: as the newest they would count among those to keep.
    """
    names = []
    for path in by_age(folder):
        if _step_of(path) > step:
            aside = path.with_name(path.name + ".undone")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            names.append(aside.name)
    return names


def promote(source: Path, best: Path, note: dict[str, Any]) -> None:
    """Make `best` a copy of a checkpoint's export (hard links where the file system has them), with `note` beside it."""
    partial = partial_path(best)

    def link(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    shutil.copytree(source / "hf", partial / "hf", copy_function=link)
    (partial / "best.json").write_text(dumps(note, indent=1) + "\n")
    commit(partial, best, read_state(source))


def read_best(best: Path, step: int) -> dict[str, Any]:
    """Return the note of `best`; {} if there is none, or if it is from a step after `step`, which was undone."""
    file = best / "best.json"
    try:
        note = json.loads(file.read_text()) if file.is_file() else {}
        return note if note.get("step", 0) <= step else {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete {best}, the next evaluation makes another") from error


def _drop_optimizer(path: Path) -> None:
    # The listing first: a crash in between leaves files that are not listed, never listed files that are missing.
    listing = path / FILES_FILE
    files = json.loads(listing.read_text())
    kept = {name: entry for name, entry in files.items() if not name.startswith(OPTIMIZER_FOLDER + os.sep)}
    aside = listing.with_name(FILES_FILE + ".partial")
    aside.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(aside, listing)
    shutil.rmtree(path / OPTIMIZER_FOLDER)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def _flush_and_sum(path: Path) -> tuple[int, int]:
    _flush(path)
    return path.stat().st_size, _crc(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Finished groups that are kept with a checkpoint, so that a run that goes on from it need not roll them out again.

One group is two files in the checkpoint's folder `rollouts`: its arrays (`.npz`, read without pickle), and all else as JSON. A
Ray task writes them beside training, before the checkpoint is complete, and another one reads a group when its turn comes.

Invariants:
* a group is kept with its media: nothing else need be alive to train on it;
* it keeps its name, rewards and recorded log-probs, and its place in the order of the groups, so the bound on age holds
  (`rl.groups.buffer`);
* one that was lost before it could be written, or was written by other code, is rolled out again, as if it had not been kept;
* a checkpoint does not depend on them: where the disk is full, or time is short, fewer are kept, or none.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from pydantic import TypeAdapter
from ray.exceptions import RayError

from conf.platform import CheckpointConfig
from rewards.compose import RewardResult
from rl.groups.buffer import GroupBuffer
from rl.results import ReadyGroup
from runtime.stop import StopSignal
from streams.log.record import ChunkRecord, LogHeader, StreamLog
from streams.messages import MESSAGES_VERSION, GroupPayload, GroupSummary
from streams.positions.regions import RegionLog

FOLDER = "rollouts"
FETCH_S = 60.0
"""How long a group's payload may take from the object store; one that takes longer is not kept."""
ARRAYS = tuple(field.name for field in fields(StreamLog) if field.name not in ("header", "chunks", "regions"))
REGIONS = tuple(field.name for field in fields(RegionLog))

DAMAGED = (ValueError, KeyError, TypeError, IndexError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error)
"""What reading a file raises that does not hold what was written."""

RESULTS, CHUNKS = tuple[RewardResult, ...], tuple[ChunkRecord, ...]

T = TypeVar("T")
log = logging.getLogger("sightline.rollouts")


@dataclass(frozen=True)
class KeptGroup:
    """A group in a checkpoint. path: of its files, without their suffixes."""

    path: Path
    summary: GroupSummary
    results: tuple[RewardResult, ...]

    def ready(self, payload: Any) -> ReadyGroup:
        """payload: a reference to what `fetch` has read."""
        return ReadyGroup(self.summary, payload, self.results)


class Keeper:
    """Writes the finished groups of `buffer` into each checkpoint."""

    def __init__(self, config: CheckpointConfig, stop: StopSignal, buffer: GroupBuffer[ReadyGroup]) -> None:
        self._config, self._stop, self._buffer = config, stop, buffer

    def __call__(self, partial: Path) -> list[Any]:
        """Have them written, in a third of the time that the checkpoint has. Returns references to wait for."""
        groups = self._buffer.finished
        limit_s = (self._config.grace_s if self._stop.requested else self._config.deadline_s) / 3
        light = [(replace(group.summary, features=None, feature_bytes=0), group.results) for group in groups]
        # Payloads in a list, so that Ray does not wait for them, nor fail all if one is lost.
        return [_write.remote(light, [group.payload for group in groups], str(partial / FOLDER), limit_s)]


def read(checkpoint: Path) -> dict[str, KeptGroup]:
    """Return the groups of a checkpoint by name; {} if it has none that this code can read."""
    found: dict[str, KeptGroup] = {}
    for path in sorted((checkpoint / FOLDER).glob("*.json")):
        try:
            stored = json.loads(path.read_text())
            if stored["version"] != MESSAGES_VERSION:
                log.warning("%s was written by other code: its groups are rolled out again", path.parent)
                return {}
            summary = _typed(GroupSummary, stored["summary"])
            results = _typed(RESULTS, stored["results"])
        except (*DAMAGED, OSError) as error:
            log.warning("%s is damaged (%s: %s): its group is rolled out again", path, type(error).__name__, error)
            continue
        found[summary.group] = KeptGroup(path.with_suffix(""), summary, results)
    return found


def fetch(kept: KeptGroup) -> tuple[Any, Any]:
    """Have a group read. Returns references: to None once it is there, or to an OSError or ValueError; to its payload."""
    # Once: if what it has read is lost, the checkpoint may be, too, and the group is rolled out again.
    references: Any = _fetch.options(num_returns=2, max_retries=0).remote(str(kept.path))
    why, payload = references
    return why, payload


@ray.remote(num_cpus=0)
def _write(
    light: list[tuple[GroupSummary, tuple[RewardResult, ...]]], payloads: list[Any], folder: str, limit_s: float
) -> list[str]:
    written: list[str] = []
    until = time.monotonic() + limit_s
    for (summary, results), reference in zip(light, payloads, strict=True):
        left = min(FETCH_S, until - time.monotonic())
        if left <= 0:
            break
        try:
            payload: GroupPayload = ray.get(reference, timeout=left)
            if isinstance(payload.media, ray.ObjectRef):
                payload = replace(payload, media=ray.get(payload.media, timeout=left))
        except RayError:  # it went with its worker: the run will roll it out again, too
            continue
        try:
            store(Path(folder) / f"{len(written):05d}", summary, results, payload)
        except OSError as error:
            log.warning("finished rollouts are not kept: %s", error)
            shutil.rmtree(folder, ignore_errors=True)  # the checkpoint itself needs the room
            return []
        written.append(summary.group)
    return written


@ray.remote(num_cpus=0)
def _fetch(path: str) -> tuple[str | None, GroupPayload | None]:
    try:
        return None, load(Path(path))
    except (*DAMAGED, OSError) as error:
        return f"{path} is damaged ({type(error).__name__}: {error})", None


def store(path: Path, summary: GroupSummary, results: tuple[RewardResult, ...], payload: GroupPayload) -> None:
    """Write a group's two files. path: without suffix. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    arrays = {"media": payload.media}
    logs = []
    for i, entry in enumerate(payload.logs):
        arrays |= {f"{i}.{name}": getattr(entry, name) for name in ARRAYS}
        if entry.regions is not None:
            arrays |= {f"{i}.regions.{name}": getattr(entry.regions, name) for name in REGIONS}
        logs.append(
            {
                "header": asdict(entry.header),
                "chunks": [asdict(chunk) for chunk in entry.chunks],
                "regions": entry.regions is not None,
            }
        )
    with open(path.with_suffix(".npz"), "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    stored = {
        "version": MESSAGES_VERSION,
        "summary": asdict(summary),
        "results": [asdict(result) for result in results],
        "logs": logs,
        "media_kind": payload.media_kind,
    }
    path.with_suffix(".json").write_text(json.dumps(stored) + "\n")


def load(path: Path) -> GroupPayload:
    """Return the payload of a group. path: without suffix. Raises OSError, or one of DAMAGED."""
    stored = json.loads(path.with_suffix(".json").read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        logs = tuple(
            StreamLog(
                header=_typed(LogHeader, entry["header"]),
                chunks=_typed(CHUNKS, entry["chunks"]),
                regions=RegionLog(**{name: arrays[f"{i}.regions.{name}"] for name in REGIONS})
                if entry["regions"]
                else None,
                **{name: arrays[f"{i}.{name}"] for name in ARRAYS},
            )
            for i, entry in enumerate(stored["logs"])
        )
        for entry in logs:
            if {getattr(entry, name).shape[-1:] for name in ARRAYS} != {(len(entry.ids),)}:
                raise ValueError("the columns of a stream are not equally long")
        return GroupPayload(logs, stored["media_kind"], arrays["media"])


def _typed(kind: type[T], stored: Any) -> T:
    """Return what `asdict` and JSON have made of a dataclass. Raises ValueError."""
    value: T = _adapters[kind].validate_python(stored)
    return value


_adapters: dict[Any, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (GroupSummary, RESULTS, LogHeader, CHUNKS)
}

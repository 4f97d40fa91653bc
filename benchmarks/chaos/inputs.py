"""Malformed inputs: task rows, settings, clips and checkpoints, generated and fuzzed. Each must end clearly.

Clearly means: it is refused with a message that names the file, the row or the key; or it is as good as the sound one that it
was made from. A bare traceback, another exception, a hang, or a result that differs without a word, is unclear.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.mistakes import explain
from conf.schema import RunConfig
from runtime.store.checkpoint import CheckpointState, Groups, commit, verify
from runtime.store.manifests import flat
from streams.data.dataset import load_tasks
from streams.video.config import VideoConfig
from streams.video.reader import ClipReader, VideoError
from tests.support.clips import write_grey_ramp
from tests.support.configs import composed

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\0", "x" * 5000),
    *("../../../etc/passwd", "http://127.0.0.1/x.mp4", "<script>", "日本", "\ud800", [], {}, [[]], {"a": 1}, [None]),
)
ROW = {
    "id": "good",
    "video": "clip.mp4",
    "end": 6.0,
    "queries": [{"time": 1.25, "text": "What colour is the shape now?"}],
    "answers": [{"time": 2.25, "text": "red"}],
}
CHOSEN = "rl"


def try_inputs(count: int, seed: int, folder: Path) -> list[str]:
    """Try so many inputs, of each sort in its turn. Returns for each what was unclear; empty: nothing."""
    chance = random.Random(f"inputs/{seed}")
    room = folder / "inputs"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    sorts = [_Rows(room), _Settings(), _Clips(room), _Checkpoints(room)]
    try:
        return [sorts[number % len(sorts)].once(chance) for number in range(count)]
    finally:
        for sort in sorts:
            sort.close()


class _Sort:
    """Inputs of one sort. `once` makes one, tries it, and returns what was unclear."""

    def once(self, chance: random.Random) -> str:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _spoilt(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Return bytes that are flipped, cut off, doubled or zeroed somewhere, and what was done to them, in words."""
    at = chance.randrange(len(data))
    how = chance.choice(("flip", "cut", "double", "zero", "insert"))
    if how == "flip":
        spoilt = bytearray(data)
        for _ in range(chance.choice((1, 4, 64))):
            spoilt[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(spoilt), "bits flipped"
    if how == "cut":
        return data[:at], f"cut off at {at}"
    if how == "double":
        return data[:at] + data, f"doubled from {at}"
    if how == "zero":
        return data[:at] + bytes(len(data) - at), f"zeros from {at}"
    return data[:at] + chance.randbytes(chance.choice((1, 16, 300))) + data[at:], f"noise at {at}"


def _checked(what: str, named: str, refusals: tuple[type[Exception], ...], attempt: Callable[[], str]) -> str:
    """Run `attempt`, which returns what is unclear about its result; a refusal must name `named`."""
    try:
        unclear = attempt()
    except refusals as error:
        return "" if named in str(error) else f"{what}: {type(error).__name__} does not name {named}: {error}"
    except Exception as error:  # noqa: BLE001 - whatever else it raises is what this looks for
        return f"{what}: {type(error).__name__}: {error}"
    return f"{what}: {unclear}" if unclear else ""


class _Rows(_Sort):
    """A row of a task file beside a sound one."""

    def __init__(self, room: Path) -> None:
        self._file = room / "tasks.jsonl"
        self._file.write_text(json.dumps(ROW) + "\n")
        load_tasks(self._file, on_bad="raise")

    def once(self, chance: random.Random) -> str:
        if chance.random() < 0.5:
            row = json.loads(json.dumps(ROW | {"id": "bad"}))
            place: Any = row
            key: Any = chance.choice(list(row))
            while isinstance(place[key], list | dict) and place[key] and chance.random() < 0.7:
                place, inner = place[key], place[key]
                key = chance.choice(list(inner)) if isinstance(inner, dict) else chance.randrange(len(inner))
            if chance.random() < 0.2:
                del place[key]
                what = f"row without {key}"
            else:
                place[key] = chance.choice(ODD)
                what = f"row with {key}={place[key]!r}"[:200]
            line = json.dumps(row).encode()
        else:
            line, what = _spoilt(json.dumps(ROW | {"id": "bad"}).encode(), chance)
            what = f"row, {what}"
        self._file.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
        return _checked(what, str(self._file), (ValueError,), self._load)

    def _load(self) -> str:
        found = load_tasks(self._file)
        if found.tasks[0].id != "good":
            return "the sound row beside it is gone"
        if unnamed := [s for s in found.skipped if f"{self._file}:" not in s.source or not s.reason]:
            return f"skipped without its row or a reason: {unnamed}"
        # A line may hold several ends of lines now, and none of them may vanish without a word.
        with self._file.open(errors="replace") as file:
            lines = sum(bool(line.strip()) for line in file)
        return "" if len(found.tasks) + len(found.skipped) == lines else f"{lines} lines, but {found}"


class _Settings(_Sort):
    """One word of a command line."""

    def __init__(self) -> None:
        default = composed(f"job={CHOSEN}", "model.path=/nowhere")
        self._keys = [key for key, value in flat(asdict(default)).items() if not isinstance(value, dict | list)]

    def once(self, chance: random.Random) -> str:
        key = chance.choice(self._keys)
        value = chance.choice(
            ("nan", "inf", "-1", "-0.5", "1e400", "maybe", "[]", "{a: 1}", "null", "''", "[1,2", "???", "0")
        )
        if chance.random() < 0.15:
            key = key[:-1] + chance.choice("xyz")
        word = f"{key}={value}"

        def attempt() -> str:
            try:
                config = composed(f"job={CHOSEN}", "model.path=/nowhere", word)
            except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
                raise ValueError(explain(error, [word])) from error
            return "" if isinstance(config, RunConfig) else "no configuration"

        return _checked(f"setting {word}", key.rpartition(".")[2][:-1], (ValueError,), attempt)


class _Clips(_Sort):
    """A clip of grey frames, whose number is told by their grey."""

    SECONDS = 6

    def __init__(self, room: Path) -> None:
        self._path = room / "clip.mp4"
        write_grey_ramp(self._path, 10 * self.SECONDS, 10.0)
        self._sound = self._path.read_bytes()
        self._reader = ClipReader(VideoConfig(min_pixels=784, max_pixels=3136))
        self._shape = self._read().shape

    def _read(self) -> np.ndarray:
        return self._reader.read(str(self._path), 0.0, float(self.SECONDS), self.SECONDS).frames

    def once(self, chance: random.Random) -> str:
        spoilt, what = _spoilt(self._sound, chance)
        self._path.write_bytes(spoilt)

        def attempt() -> str:
            # Frames that differ are no failure: without a checksum nobody can see a flip in compressed data.
            frames = self._read()
            return "" if frames.shape[0] == self._shape[0] else f"{frames.shape[0]} chunks of {self._shape[0]}"

        return _checked(f"clip, {what}", str(self._path), (VideoError,), attempt)

    def close(self) -> None:
        self._reader.close()


class _Checkpoints(_Sort):
    """A file of a complete checkpoint."""

    STATE = CheckpointState("rl", 4, 4, Groups(((0, 1),)), Groups(((2, 2),)), ("a", "b", "c"), 0, 2, {"seconds": 1.5})

    def __init__(self, room: Path) -> None:
        self._path = room / "step000004"
        partial = room / "step000004.partial"
        (partial / "hf").mkdir(parents=True)
        (partial / "hf" / "model.safetensors").write_bytes(random.Random(0).randbytes(3000))
        (partial / "hf" / "config.json").write_text(json.dumps({"model_type": "tiny"}))
        commit(partial, self._path, self.STATE)
        self._sound = {file: file.read_bytes() for file in self._path.rglob("*") if file.is_file()}

    def once(self, chance: random.Random) -> str:
        file = chance.choice(sorted(self._sound))
        if chance.random() < 0.2:
            file.unlink()
            what = "deleted"
        else:
            spoilt, what = _spoilt(self._sound[file], chance)
            file.write_bytes(spoilt)
        try:
            return _checked(
                f"checkpoint, {file.name} {what}",
                str(self._path),
                (ValueError, FileNotFoundError),
                lambda: self._verify(file),
            )
        finally:
            file.write_bytes(self._sound[file])

    def _verify(self, file: Path) -> str:
        found = verify(self._path)
        if file.exists() and file.read_bytes() == self._sound[file]:
            return ""
        # The listing itself has no checksum; whatever else it says, what it lists is what was written.
        same = found.state == self.STATE and file.name == "files.json"
        return "" if same else f"it passes for sound, with {found.state}"

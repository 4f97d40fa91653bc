"""The quickstart's data: clips with one coloured shape at a time, and questions about now, before and next.

Each clip has one query and one answer. There are three modes (StreamTask.category), in equal numbers held out; recall
takes every second training clip:

    now      the colour of the shape that is visible
    recall   the colour of the last shape, asked after it vanished more than `window` chunks ago
    alert    the colour of the next shape, as soon as it appears

Invariants:
* the colours of a clip's shapes are independent;
* answers are balanced over the colours within a mode;
* thoughts name only what is visible;
* the same config gives the same files;
* a folder that this generator did not write is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from streams.data.dataset import write_tasks
from streams.data.synthetic.scenes import COLOURS, SHAPES, Scene, Shown, draw, write_clip
from streams.task import ExpectedAnswer, StreamTask, TimedQuery, TimedThought

MODES = ("now", "recall", "alert")
TRAIN_TURNS = ("now", "recall", "alert", "recall")
NAMES = tuple(COLOURS)
TAIL_CHUNKS = 5
"""Chunks after the one in which the answer is due: an answer that comes four chunks late is still inside."""
SIZES = ((56, 56), (48, 64), (72, 96), (96, 72), (112, 112), (144, 96))
FRAMES_PER_CHUNK = (4, 5, 8, 10, 12)
SIDES = (0.5, 0.7)
JITTER = 0.08
NOTHING = "nothing"
MANIFEST = "manifest.json"
VERSION = 1
"""Raised whenever the same config would give other data."""
MADE_BY = "streams.synthetic"
"""Written in every manifest, and never changed, wherever this module moves: it tells our folders from anybody else's."""
LATEST_ALERT = 9
SHORTEST_RECALL = 2

Made = tuple[list[tuple[int, int, str]], int, int]
"""What a mode decides: (first chunk, stop chunk, colour) of each shape, the query's chunk, the answer's
chunk.
"""


@dataclass(frozen=True)
class SyntheticConfig:
    """The clips and questions that `job=data` generates."""

    train_clips: int = 240
    """Training clips, with one question each."""
    heldout_per_mode: int = 96
    """Held-out clips of each of the modes now, recall and alert."""
    window: int = 4
    """Chunks of memory that a recall question must outlast; at least `memory.window` where the policy has one."""
    seed: int = 0
    """Seed of clips and questions."""
    chunk_seconds: float = 1.0
    """Length of a chunk in seconds, from 0.1 to 60."""
    min_turns: int = 10
    """Shortest clip, in chunks."""
    max_turns: int = 20
    """Longest clip, in chunks."""
    full_length: bool = False
    """Make every clip `data.synthetic.max_turns` long."""
    frame: tuple[int, ...] = ()
    """Frame size as [height, width] in pixels, both even and at least 16; empty = several small sizes."""

    def __post_init__(self) -> None:
        # Lists come from YAML.
        object.__setattr__(self, "frame", tuple(self.frame))
        if self.frame and (len(self.frame) != 2 or any(side < 16 or side % 2 for side in self.frame)):
            raise ValueError(
                f"data.synthetic.frame={list(self.frame)} must be [height, width], both even and at least 16 pixels, or empty"
            )
        for name in ("train_clips", "heldout_per_mode", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.synthetic.{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(
                f"data.synthetic.seed={self.seed} must not be negative (it is `seed`, where it is not set)"
            )
        if not 0.1 <= self.chunk_seconds <= 60:
            raise ValueError(f"data.synthetic.chunk_seconds={self.chunk_seconds} must lie in [0.1, 60]")
        longest = LATEST_ALERT + 1 + TAIL_CHUNKS
        if not 1 <= self.min_turns <= longest:
            raise ValueError(f"data.synthetic.min_turns={self.min_turns} must lie in [1, {longest}]")
        needed = max(self.min_turns, self.window + SHORTEST_RECALL + 1 + TAIL_CHUNKS, 11)
        if self.max_turns < needed:
            raise ValueError(
                f"data.synthetic.max_turns={self.max_turns} must be at least {needed} for "
                f"data.synthetic.window={self.window} and data.synthetic.min_turns={self.min_turns}"
            )

    @property
    def due_range(self) -> tuple[int, int]:
        """First and last chunk in which an answer may be due, so that streams keep to the wanted lengths."""
        return max(0, self.min_turns - 1 - TAIL_CHUNKS), self.max_turns - 1 - TAIL_CHUNKS


@dataclass(frozen=True)
class GeneratedData:
    """Where the data are. fresh: written by this call, not found intact from an earlier one."""

    root: Path
    train_jsonl: Path
    heldout_jsonl: Path
    fresh: bool


def generate(root: str | Path, config: SyntheticConfig) -> GeneratedData:
    """Write train.jsonl, heldout.jsonl and their clips below `root`, unless they are there as they would be written.

    Raises ValueError for a folder that is somebody else's, OSError if it cannot be written.
    """
    root = Path(root).absolute()
    if _intact(root, config):
        return _result(root, fresh=False)
    if root.exists() and not _ours(root):
        raise ValueError(f"{root} exists and was not made by this generator: choose another folder for the data")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays on one file system.
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            made, old = work / "new", work / "old"
            made.mkdir()
            _write_all(made, config)
            if root.exists():
                root.rename(old)
            try:
                made.rename(root)
            except OSError:
                if old.exists():
                    old.rename(root)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the synthetic data to {root}: {error.strerror} (free some space or choose another folder)",
        ) from error
    return _result(root, fresh=True)


def make_task(config: SyntheticConfig, split: str, index: int, mode: str, colour: str) -> tuple[StreamTask, Scene]:
    """Make clip number `index` of a split: its task, with a video path relative to the folder, and its scene."""
    rng = _rng(config, split, index)
    shapes, asked, due = _MAKERS[mode](config, rng, colour)
    chunks = max(config.min_turns, due + 1 + TAIL_CHUNKS + int(rng.integers(0, 3)))
    chunks = config.max_turns if config.full_length else min(chunks, config.max_turns)
    # Drawn even if it is not used: `frame` must not change what else a seed gives.
    size = SIZES[rng.integers(len(SIZES))]
    height, width = config.frame or size
    scene = Scene(
        chunks=chunks,
        chunk_seconds=config.chunk_seconds,
        frames_per_chunk=int(rng.choice(FRAMES_PER_CHUNK)),
        height=height,
        width=width,
        shown=tuple(
            Shown(
                first=first,
                stop=min(stop, chunks),
                colour=name,
                shape=SHAPES[rng.integers(len(SHAPES))],
                side=float(rng.uniform(*SIDES)),
                row=float(rng.uniform(-JITTER, JITTER)),
                column=float(rng.uniform(-JITTER, JITTER)),
            )
            for first, stop, name in shapes
        ),
    )

    def seconds(chunk: int, part: float) -> float:
        return round((chunk + part) * config.chunk_seconds, 6)

    seen = [scene.visible(chunk) for chunk in range(chunks)]
    task = StreamTask(
        id=f"{split}-{index:04d}-{mode}",
        video=f"{split}/{index:04d}.mp4",
        start=0.0,
        end=seconds(chunks, 0),
        queries=(TimedQuery(seconds(asked, 0.25), _QUESTIONS[mode]),),
        answers=(ExpectedAnswer(seconds(due, 0.25), colour),),
        thoughts=tuple(
            TimedThought(seconds(chunk, 0.5), NOTHING if shape is None else shape.colour)
            for chunk, shape in enumerate(seen)
        ),
        category=mode,
    )
    return task, scene


_QUESTIONS = {
    "now": "What colour is the shape now?",
    "recall": "What colour was the last shape?",
    "alert": "Say the colour of the next shape as soon as it appears.",
}


def _make_now(config: SyntheticConfig, rng: np.random.Generator, colour: str) -> Made:
    earliest, latest = config.due_range
    asked = int(rng.integers(earliest, latest + 1))
    first = asked - int(rng.integers(0, min(3, asked) + 1))
    shapes = []
    if rng.random() < 0.5 and first >= 2:
        # An earlier shape, so that the only colour of the clip is not always the answer.
        begin = int(rng.integers(0, first - 1))
        shapes.append((begin, int(rng.integers(begin + 1, min(begin + 4, first - 1) + 1)), _any_colour(rng)))
    stop = asked + TAIL_CHUNKS + int(rng.integers(0, 4))
    return [*shapes, (first, stop, colour)], asked, asked


def _make_recall(config: SyntheticConfig, rng: np.random.Generator, colour: str) -> Made:
    earliest, latest = config.due_range

    def options(firsts: range) -> list[tuple[int, int, int]]:
        # Neither the last chunk in which the shape is visible nor its text may be within `window` turns of the
        # query.
        return [
            (first, first + length, asked)
            for first in firsts
            for length in (2, 3, 4)
            for asked in range(max(earliest, first + length + config.window), latest + 1)
        ]

    # In half of the clips an earlier shape, so that the only colour of the clip is not always the answer.
    distracted = options(range(2, 5)) if rng.random() < 0.5 else []
    possible = distracted or options(range(3))
    first, stop, asked = possible[rng.integers(len(possible))]
    shapes = [(first, stop, colour)]
    if distracted:
        begin = int(rng.integers(0, first - 1))
        shapes.insert(0, (begin, int(rng.integers(begin + 1, first)), _any_colour(rng)))
    return shapes, asked, asked


def _make_alert(config: SyntheticConfig, rng: np.random.Generator, colour: str) -> Made:
    earliest, latest = config.due_range
    distracted = rng.random() < 0.5
    options = [
        (asked, due)
        for asked in range(1 if distracted else 0, 4)
        for due in range(asked + 2, asked + 7)
        if earliest <= due <= latest
    ]
    asked, due = options[rng.integers(len(options))]
    shapes = []
    if distracted:
        begin = int(rng.integers(0, asked))
        shapes.append((begin, int(rng.integers(begin + 1, asked + 1)), _any_colour(rng)))
    return [*shapes, (due, due + TAIL_CHUNKS + int(rng.integers(0, 4)), colour)], asked, due


_MAKERS: dict[str, Callable[[SyntheticConfig, np.random.Generator, str], Made]] = {
    "now": _make_now,
    "recall": _make_recall,
    "alert": _make_alert,
}


def _any_colour(rng: np.random.Generator) -> str:
    return NAMES[rng.integers(len(NAMES))]


def _rng(config: SyntheticConfig, split: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, ("train", "heldout").index(split), *key])


def plan(config: SyntheticConfig, split: str) -> list[tuple[str, str]]:
    """(mode, answer) of every clip of a split: modes take turns, a mode's colours are dealt out evenly.

    Recall takes every second turn in training: finding a colour far back in the text takes the most practice.
    """
    count = config.train_clips if split == "train" else config.heldout_per_mode * len(MODES)
    turns = TRAIN_TURNS if split == "train" else MODES
    modes = [turns[i % len(turns)] for i in range(count)]
    dealt: dict[str, list[str]] = {}
    for number, mode in enumerate(MODES):
        need = modes.count(mode)
        # The second key keeps these draws apart from those of the clips.
        order = _rng(config, split, number, 1).permutation(need)
        dealt[mode] = [NAMES[i % len(NAMES)] for i in order]
    return [(mode, dealt[mode].pop()) for mode in modes]


def _write_all(folder: Path, config: SyntheticConfig) -> None:
    sizes: dict[str, int] = {}
    for split in ("train", "heldout"):
        (folder / split).mkdir()
        tasks = []
        for index, (mode, colour) in enumerate(plan(config, split)):
            task, scene = make_task(config, split, index, mode, colour)
            path = folder / task.video
            write_clip(path, draw(scene, _rng(config, split, index, 2)), scene.rate)
            sizes[task.video] = path.stat().st_size
            # The folder is renamed later: paths are taken relative to it when the file is written.
            tasks.append(StreamTask(**{**vars(task), "video": str(path)}))
        write_tasks(folder / f"{split}.jsonl", tasks)
        sizes[f"{split}.jsonl"] = (folder / f"{split}.jsonl").stat().st_size
    manifest = {
        "made_by": MADE_BY,
        "version": VERSION,
        "config": asdict(config),
        "hash": _config_hash(config),
        "clips": len(sizes) - 2,
        "sizes": sizes,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _config_hash(config: SyntheticConfig) -> str:
    text = json.dumps({"version": VERSION, **asdict(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(root: Path) -> dict[str, object]:
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("made_by") == MADE_BY else {}


def _ours(root: Path) -> bool:
    return root.is_dir() and (bool(_manifest(root)) or not any(root.iterdir()))


def _intact(root: Path, config: SyntheticConfig) -> bool:
    manifest = _manifest(root)
    sizes = manifest.get("sizes")
    if manifest.get("hash") != _config_hash(config) or not isinstance(sizes, dict):
        return False
    return all((root / name).is_file() and (root / name).stat().st_size == size for name, size in sizes.items())


def _result(root: Path, *, fresh: bool) -> GeneratedData:
    return GeneratedData(
        root=root,
        train_jsonl=root / "train.jsonl",
        heldout_jsonl=root / "heldout.jsonl",
        fresh=fresh,
    )

"""The size of a stage's checkpoints, compared with the free disk before anything is loaded.

Parameters are counted from the checkpoint's geometry, for which only headers are read.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from conf.schema import CheckpointConfig
from learner.config import LearnerConfig
from runtime.planning.footprint import BYTES, gib, trained_numbers
from streams.checkpoint.model_shape import ModelGeometry

OPTIMIZER_BYTES = 12
"""Per trained parameter: an fp32 master copy and AdamW's two moments."""


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint: `export` is hf/, `resume` is what deepspeed/ adds."""

    export: int
    resume: int

    @property
    def full(self) -> int:
        return self.export + self.resume


def checkpoint_size(geometry: ModelGeometry, learner: LearnerConfig) -> CheckpointSize:
    """Return the size of a checkpoint of that model. Raises ValueError for `freeze_names` that match no parameter."""
    total = geometry.total * BYTES[learner.dtype]
    return CheckpointSize(total, total + trained_numbers(geometry, learner) * OPTIMIZER_BYTES)


def needed_bytes(size: CheckpointSize, config: CheckpointConfig, *, best: bool) -> int:
    """Return the most bytes that a stage's checkpoints take at any time: those kept, and one that is being written."""
    with_optimizer = {"all": config.keep + 1, "latest": 2, "none": 0}[config.optimizer]
    return (config.keep + 1 + best) * size.export + with_optimizer * size.resume


def check_disk(root: Path, size: CheckpointSize, config: CheckpointConfig, *, best: bool, stage: str) -> str:
    """Return a line with the arithmetic. Raises ValueError if the disk under `root` is too small."""
    need = needed_bytes(size, config, best=best)
    free = shutil.disk_usage(root).free + _held(root / "checkpoints" / stage)
    copies = config.keep + 1
    words = (
        f"checkpoints of {stage}: {gib(size.export)} export + {gib(size.resume)} optimiser each; up to {copies} at once "
        f"(checkpoint.keep={config.keep}, one being written; checkpoint.optimizer={config.optimizer}) = {gib(need)}"
    )
    if need > free:
        raise ValueError(
            f"{words}, but {root} has {gib(free)} free: lower checkpoint.keep, set checkpoint.optimizer=latest, or "
            "choose a run_root on a larger disk"
        )
    return f"{words}; {gib(free)} free"


def _held(folder: Path) -> int:
    """Return the bytes of this stage's present checkpoints, which will be replaced."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

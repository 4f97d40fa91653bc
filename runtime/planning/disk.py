"""What checkpoints will weigh, compared with the free disk before anything is loaded.

Parameters are those of the checkpoint's geometry; nothing is read but headers.
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
    """Size of a checkpoint of that model. Raises ValueError for name patterns that do not fit it."""
    total = geometry.total * BYTES[learner.dtype]
    return CheckpointSize(total, total + trained_numbers(geometry, learner) * OPTIMIZER_BYTES)


def needed_bytes(size: CheckpointSize, config: CheckpointConfig, *, best: bool) -> int:
    """Most that one stage's checkpoints take at any time: those kept, and one more while it is written."""
    with_optimizer = {"all": config.keep + 1, "latest": 2, "none": 0}[config.optimizer]
    return (config.keep + 1 + best) * size.export + with_optimizer * size.resume


def check_disk(root: Path, size: CheckpointSize, config: CheckpointConfig, *, best: bool, stage: str) -> str:
    """A line with the arithmetic; ValueError with it if the disk under `root` is too small."""
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
    """Bytes that this stage's checkpoints hold already: they are replaced, not added to."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

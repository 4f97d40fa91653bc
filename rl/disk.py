"""What checkpoints will weigh, compared with the free disk before anything is loaded.

Owner: rl. Parameters are counted from the safetensors headers; nothing is read but those.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

from conf.schema import CheckpointConfig

BYTES = {"float32": 4, "bfloat16": 2}
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


def checkpoint_size(model: Path, freeze: str, dtype: str) -> CheckpointSize:
    """Size of a checkpoint trained from the folder `model`, under `learner.freeze` and `learner.dtype`."""
    total, frozen = count_parameters(model)
    trained = total - frozen if freeze != "none" else total
    return CheckpointSize(total * BYTES[dtype], total * BYTES[dtype] + trained * OPTIMIZER_BYTES)


def count_parameters(model: Path) -> tuple[int, int]:
    """(all parameters, those of the vision tower) of a checkpoint folder's safetensors files."""
    from safetensors import safe_open

    total = tower = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                size = prod(tensors.get_slice(name).get_shape())
                total += size
                tower += size if "visual." in name else 0
    return total, tower


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
        f"checkpoints of {stage}: {_gib(size.export)} export + {_gib(size.resume)} optimiser each; up to {copies} at once "
        f"(checkpoint.keep={config.keep}, one being written; checkpoint.optimizer={config.optimizer}) = {_gib(need)}"
    )
    if need > free:
        raise ValueError(
            f"{words}, but {root} has {_gib(free)} free: lower checkpoint.keep, set checkpoint.optimizer=latest, or "
            "choose a run_root on a larger disk"
        )
    return f"{words}; {_gib(free)} free"


def _held(folder: Path) -> int:
    """Bytes that this stage's checkpoints hold already: they are replaced, not added to."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"

"""What checkpoints will weigh, compared with the free disk before anything is loaded.

Owner: rl. Parameters are counted from the safetensors headers; nothing is read but those.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

from conf.schema import CheckpointConfig
from learner.config import LearnerConfig
from streams.freezing import parameter_name, trained

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


def checkpoint_size(model: Path, learner: LearnerConfig) -> CheckpointSize:
    """Size of a checkpoint trained from the folder `model`. Raises ValueError for patterns that do not fit its names."""
    sizes = parameter_sizes(model)
    total = sum(sizes.values()) * BYTES[learner.dtype]
    training = sum(sizes[name] for name in trained(sizes, learner.freeze, learner.freeze_names))
    return CheckpointSize(total, total + training * OPTIMIZER_BYTES)


def parameter_sizes(model: Path) -> dict[str, int]:
    """Numbers in every parameter of a checkpoint folder's safetensors files."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                sizes[parameter_name(name)] = prod(tensors.get_slice(name).get_shape())
    return sizes


def needed_bytes(size: CheckpointSize, config: CheckpointConfig, *, best: bool) -> int:
    """Most that one stage's checkpoints take at any time: those kept, and one more while it is written."""
    with_optimizer = config.keep + 1 if config.optimizer == "all" else 2
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


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"

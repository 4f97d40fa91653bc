"""The learner's own half of a checkpoint: everything that the next optimiser step depends on.

Layout below `deepspeed/`: `state/` (DeepSpeed: model, optimiser and scheduler, one file per rank where
partitioned), `rng_rank00000.pt` ... (random states of every rank), `learner.json` (version, and how it was
partitioned).

Invariants:
- Training continues bit for bit from what is loaded, which is what was there when it was copied.
- A state that was partitioned otherwise is refused: see PARTITIONING.
- Loading runs no code: files of tensors and plain values, or an error.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.config import LearnerConfig
from learner.parallel.ranks import Ranks

FOLDER = "deepspeed"
TAG = "state"
FACTS_FILE = "learner.json"
PARTITIONING = ("ranks", "zero_stage", "offload", "dtype", "freeze", "freeze_names")
"""Keys of `learner` that decide how the state is spread over files and tensors."""


def copy_state(path: Path, deepspeed: Any, ranks: Ranks, config: LearnerConfig, version: int) -> Callable[[], None]:
    """Copy this rank's part; return a function that writes it, to be called in any thread.

    All ranks write into the same folder, on a file system that they share. Its checkpoint engine must be collecting.
    """
    folder = path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed.save_checkpoint(str(folder), tag=TAG)
    write_deepspeed = deepspeed.checkpoint_engine.take()
    states, facts = random_states(), partitioning(config) | {"version": version}

    def write() -> None:
        write_deepspeed()
        torch.save(states, folder / _random_file(ranks.rank))
        if ranks.leads:
            (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")

    return write


def load_state(path: Path, deepspeed: Any, ranks: Ranks, config: LearnerConfig) -> int:
    """Load what `copy_state` had written and return the version.

    Raises FileNotFoundError or ValueError on every rank if any rank's part is missing or does not fit.
    """
    folder = path / FOLDER
    facts: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        facts = check_fits(folder, ranks, config)
    except (FileNotFoundError, ValueError) as error:
        problem = error
    # One rank's missing file must not leave the others waiting in the collective load.
    ranks.agree(problem, f"to find their parts of {path}")
    with weights_only(deepspeed):
        loaded, _ = deepspeed.load_checkpoint(str(folder), tag=TAG)
    if loaded is None:
        raise ValueError(f"{folder}: DeepSpeed could not load the state there; it is damaged or incomplete")
    restore_random_states(torch.load(folder / _random_file(ranks.rank), weights_only=True))
    return int(facts["version"])


@contextmanager
def weights_only(deepspeed: Any) -> Iterator[None]:
    """Let a DeepSpeed engine read files as tensors and plain values alone; by itself it runs whatever a pickle says.

    Raises ValueError that names a file which holds anything else.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Safe(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            try:
                with torch.serialization.safe_globals(_state_classes()):
                    return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{path} holds more than tensors and plain values, so it is not loaded: it could run code "
                    f"({_reason(error)}). Go on from another checkpoint, or from the exported weights"
                ) from None

    own, deepspeed.checkpoint_engine = deepspeed.checkpoint_engine, Safe()
    try:
        yield
    finally:
        deepspeed.checkpoint_engine = own


def _reason(error: Exception) -> str:
    """Return the line of torch's page about it that says what was found."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "UnpicklerError" in line or "UnpicklingError" in line), lines[0])[
        :200
    ]


def _state_classes() -> list[Any]:
    """Return the classes beside tensors that DeepSpeed writes into a state; making one of them does nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def check_fits(folder: Path, ranks: Ranks, config: LearnerConfig) -> dict[str, Any]:
    """Return the contents of `learner.json` of a complete state.

    Raises FileNotFoundError if a file is missing, ValueError if the state was partitioned otherwise than in this run.
    """
    if not (folder / TAG).is_dir() or not (folder / FACTS_FILE).is_file():
        raise FileNotFoundError(f"{folder.parent}: no DeepSpeed state there")
    facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text())
    for key, value in partitioning(config).items():
        if facts.get(key) != value:
            raise ValueError(
                f"{folder} was written with learner.{key}={facts.get(key)} but this run has learner.{key}="
                f"{value}: resume with the same value, or start from the exported weights in "
                f"{folder.parent / 'hf'} (which leaves the optimiser's state behind)"
            )
    if not (folder / _random_file(ranks.rank)).is_file():
        raise FileNotFoundError(f"{folder}: the random state of rank {ranks.rank} is missing")
    return facts


def partitioning(config: LearnerConfig) -> dict[str, Any]:
    """Return the values of PARTITIONING, JSON-ready."""
    values = {key: getattr(config, key) for key in PARTITIONING}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _random_file(rank: int) -> str:
    return f"rng_rank{rank:05d}.pt"


def random_states() -> dict[str, Any]:
    """Return the states of all random generators of this process, as plain values and tensors.

    They must pass `torch.load(weights_only=True)`, which accepts no numpy arrays.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])

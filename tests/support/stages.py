"""What the stages of a run leave in its run_root: manifests, checkpoints, data."""

from __future__ import annotations

from conf.jobs import JobConfig
from conf.schema import MemoryConfig, RunConfig
from runtime.store.checkpoint import OPTIMIZER_FOLDER, CheckpointState, commit, partial_path
from runtime.store.manifests import StageStore
from tests.support.stage import named


def config(root, *, stages=("data", "sft", "rl", "eval"), **changes):
    return RunConfig(run_root=str(root), memory=MemoryConfig("full"), job=JobConfig("all", list(stages)), **changes)


def checkpoint(root, stage, step, name=None, **kept):
    path = root / "checkpoints" / stage / (name or f"step{step:06d}")
    partial = partial_path(path)
    (partial / OPTIMIZER_FOLDER).mkdir()
    (partial / OPTIMIZER_FOLDER / "state.pt").write_text("state")
    commit(partial, path, CheckpointState(stage, step, step, named(*(f"0/{i}" for i in range(step))), **kept))
    return path


def store(run, said=None):
    return StageStore(run.root, run, (said if said is not None else []).append)


def begun(run, stage, **finished):
    """Write the manifest that a stage leaves behind, finished if a result is given."""
    kept = store(run)
    kept.plan()
    kept.begin(stage)
    if finished:
        kept.finish(stage, finished)


def with_data(root):
    (root / "data").mkdir(parents=True)
    for split in ("train", "heldout"):
        (root / "data" / f"{split}.jsonl").write_text("{}\n")

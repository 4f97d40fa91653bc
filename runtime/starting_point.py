"""Which checkpoint a job starts from, and what that checkpoint says about how it must be run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from conf.schema import RunConfig
from conf.streaming import apply_streaming, overridden_keys, read_streaming
from runtime.store.manifests import StagePlan


def model_folder(config: RunConfig) -> Path | None:
    """The folder of the model that the job starts from; None while there is none: a tiny one yet to be built, a hub id."""
    base = base_checkpoint(config)
    named = [base[1]] if base else []
    named += [Path(config.model.path)] if config.model.path else []
    return next((path for path in named if (path / "config.json").is_file()), None)


def own_checkpoints(root: Path) -> dict[str, Path]:
    """The exports that the stages of this run_root have finished, in the order of the stages."""
    made = {stage: root / "checkpoints" / stage / "final" / "hf" for stage in ("sft", "rl")}
    return {stage: path for stage, path in made.items() if path.is_dir()}


def cold_start(root: Path) -> Path | None:
    """The export that RL in this run_root starts from; None if it has had no cold start. Raises ValueError if that one
    is not there: RL would begin with weights that know nothing.
    """
    made = own_checkpoints(root).get("sft")
    if made is None and (root / "stages" / "sft.json").is_file():
        raise ValueError(
            f"{root} has begun stage sft, but {root / 'checkpoints' / 'sft' / 'final'}, which RL starts from, is not there: "
            "finish it with job=sft (or job=all) and resume=auto, or set algorithm.init to a checkpoint folder"
        )
    return made


def check_cold_start(config: RunConfig, plans: dict[str, StagePlan]) -> None:
    """RL that begins needs what the stage before has made, or will make in this job. Raises ValueError."""
    rl, sft = plans.get("rl"), plans.get("sft")
    if rl and rl.fresh and config.algorithm.init == "auto" and (sft is None or sft.skip):
        cold_start(config.root)


def reference_of_branch(origin: Path) -> Path | None:
    """What RL started from in the run_root that the checkpoint `origin` belongs to; None if from the run's own model."""
    stage = origin.parent
    root = stage.parent.parent
    if stage.parent.name != "checkpoints" or not (root / "stages").is_dir():
        raise ValueError(
            f"algorithm.reference=auto is what RL started from, and the run_root of {origin} does not tell: set "
            "algorithm.reference to that checkpoint's folder"
        )
    return cold_start(root)


def base_checkpoint(config: RunConfig) -> tuple[str, Path] | None:
    """(config key, folder) of the checkpoint whose streaming.json the job must respect; None if there is none."""
    if config.resume not in ("auto", "never"):
        return "resume", Path(config.resume) / "hf"
    stages = config.job.stages
    if "sft" in stages or stages == ["data"]:
        return None
    chosen = config.algorithm.init if "rl" in stages else config.eval.checkpoint
    key = "algorithm.init" if "rl" in stages else "eval.checkpoint"
    if chosen not in ("auto", "best"):
        path = Path(chosen)
        return (key, path) if path.is_dir() else None
    if chosen == "best":
        return key, config.root / "checkpoints" / "rl" / "best" / "hf"
    own = own_checkpoints(config.root)
    if "rl" in stages:
        own.pop("rl", None)
    if own:
        return key, list(own.values())[-1]
    path = Path(config.model.path)
    return ("model.path", path) if config.model.path and path.is_dir() else None


def respect_checkpoint(
    config: RunConfig, overrides: Collection[str], say: Callable[[str], None], warn: Callable[[str], None]
) -> RunConfig:
    """Take over what the job's starting checkpoint says about how it runs (see conf.streaming)."""
    base = base_checkpoint(config)
    if base is None:
        return config
    key, path = base
    applied = apply_streaming(config, read_streaming(path), overridden_keys(overrides))
    if applied.conflicts and key == "resume":
        raise ValueError(
            f"resume={config.resume}: {'; '.join(applied.conflicts)}. A stage is resumed as it was begun: drop the "
            "override, or start a new stage with algorithm.init"
        )
    if applied.taken:
        say(f"settings from {path}: {', '.join(applied.taken)}")
    for conflict in applied.conflicts:
        warn(f"{conflict}; the override is used")
    return applied.config

"""What can be known before any actor starts: derived quantities, missing inputs, settings that a checkpoint brings.

Owner: rl. Invariant: whatever fails here has cost nothing yet and deleted nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from conf.schema import RunConfig
from conf.streaming import apply_streaming, overridden_keys, read_streaming
from evals.best import check_best
from rl.buffer import age_bound
from rl.stages import StagePlan, replaced_by
from streams.dataset import load_tasks
from streams.log import BYTES_PER_TOKEN
from streams.memory import check_args_taken, check_text_tells_time, live_bound, make_policy
from streams.pretrained import FAMILIES, is_hub_id, model_type, token_side
from streams.weights import check_weights


def describe(config: RunConfig) -> list[str]:
    """The derived quantities of a run, printed before it starts."""
    algorithm = config.algorithm
    age = age_bound(config)
    video = config.data.video
    patches = video.frames_per_chunk // 2
    # A turn's scaffold is 13 tokens; a timestamp with its own vision tags adds at most 11 a temporal patch.
    per_turn = patches * (video.max_pixels // pixels_per_token(config) + 11) + 13 + config.layout.max_new_tokens
    log_kib = BYTES_PER_TOKEN * per_turn * config.data.max_turns / 1024
    length = f"{algorithm.steps} steps" if algorithm.steps else f"{algorithm.epochs:g} epochs"
    pool = f"{config.rollout.kv_memory_mb} MiB" if config.rollout.kv_memory_mb else "what the device has left"
    return [
        f"run: job={config.job.name} seed={config.seed} run_root={config.root.resolve()}",
        f"rl: {algorithm.groups_per_step} groups x {algorithm.group_size} = {config.streams_per_step} streams per step, "
        f"{length}, {algorithm.mode}; age bound ({age.capacity} - 1) // {age.batch} + {age.lag} = {age.bound}",
        f"memory: {config.memory.words}; KV pool {pool} on each of "
        f"{config.rollout.workers} workers, up to {config.rollout.max_streams} streams each",
        f"log budget: at most about {log_kib:.0f} KiB a stream, {log_kib * config.streams_per_step / 1024:.1f} MiB a step; "
        f"frames and features cached: {config.data.cache_mb} MiB each per worker",
    ]


def model_folder(config: RunConfig) -> Path | None:
    """The folder of the model that the job starts from; None while there is none: a tiny one yet to be built, a hub id."""
    base = base_checkpoint(config)
    named = [base[1]] if base else []
    named += [Path(config.model.path)] if config.model.path else []
    return next((path for path in named if (path / "config.json").is_file()), None)


def pixels_per_token(config: RunConfig) -> int:
    """Pixels of a frame behind one merged video token. A hub id that is not at hand yet counts as its family's."""
    folder = model_folder(config)
    if folder is not None:
        return token_side(folder) ** 2
    if not config.model.path:
        return config.model.tiny.token_side**2
    return 32**2 if "Qwen3" in config.model.path else 28**2


def writes_time(config: RunConfig) -> bool:
    """Whether the backbone writes the time of a chunk as text; what cannot be told yet counts as no."""
    folder = model_folder(config)
    if folder is not None:
        family = FAMILIES.get(model_type(folder))
        return family is not None and family.timestamps
    return not config.model.path and FAMILIES[config.model.tiny.model_type].timestamps


def check_memory(config: RunConfig) -> None:
    """Raises ValueError, with the config key, for a memory that cannot work with this backbone or these frames.

    What a hub id turns out to be is asked again before its weights are loaded (rl.fit).
    """
    check_args_taken(config.memory)
    policy, video = make_policy(config.memory), config.data.video
    check_text_tells_time(policy, writes_time(config))
    chunk = video.frames_per_chunk // 2 * max(1, video.max_pixels // pixels_per_token(config))
    turn = chunk + config.layout.max_new_tokens
    live_bound(policy, per_turn=turn, fixed=0, video_per_turn=chunk, turns=config.data.max_turns)


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


def preflight(config: RunConfig) -> None:
    """Raises ValueError or FileNotFoundError for what would fail later."""
    if config.root.exists() and not config.root.is_dir():
        raise ValueError(f"run_root={config.run_root} is a file: name a folder, new or of an earlier run")
    age_bound(config)
    _check_data(config)
    for key, value in _named_checkpoints(config):
        folder = Path(value)
        if not folder.is_dir() and not is_hub_id(value):
            raise FileNotFoundError(f"{key}={value}: no such folder, and not a hub id of the form owner/name")
        if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "hf" / "config.json").is_file():
            raise ValueError(f"{key}={value} is a whole checkpoint: name its export, {key}={Path(value) / 'hf'}")
        if folder.is_dir():
            _check_folder(key, folder)
    unset = config.eval.checkpoint == "auto" and not config.model.path
    if config.job.stages == ["eval"] and unset and not own_checkpoints(config.root):
        raise FileNotFoundError(
            f"job=eval: no checkpoint under {config.root / 'checkpoints'}; run job=sft first or set eval.checkpoint"
        )
    best = config.root / "checkpoints" / "rl" / "best" / "hf"
    if config.eval.checkpoint == "best" and "rl" not in config.job.stages and not best.is_dir():
        raise FileNotFoundError(f"eval.checkpoint=best: there is no {best}; train with eval.every=N first")


def _check_folder(key: str, folder: Path) -> None:
    """A hub id is checked when it has been resolved, before an actor loads it (rl.run)."""
    try:
        check_weights(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{key}: {error}") from error


def _check_data(config: RunConfig) -> None:
    stages = set(config.job.stages)
    needed = [split for split, by in (("train", {"sft", "rl"}), ("heldout", {"eval"})) if stages & by]
    if config.eval.every and "rl" in stages and "heldout" not in needed:
        needed.append("heldout")
    for split in needed:
        given = getattr(config.data, split)
        path = Path(given) if given else config.root / "data" / f"{split}.jsonl"
        if given or "data" not in stages:
            if not path.is_file():
                how = f"set data.{split} to a JSONL file" if given else f"set data.{split} or run job=data first"
                raise FileNotFoundError(f"data.{split}: {path} does not exist ({how})")
            # Rows are read again, and bad ones named, when a stage uses them; a file without one usable row ends here.
            data = config.data
            loaded = load_tasks(path, format=data.format, ignore_fields=data.ignore_fields)
            if split == "heldout":
                check_best(config, loaded.tasks)
        elif split == "heldout":
            check_best(config, None)


def check_nothing_needed_is_replaced(config: RunConfig, plans: dict[str, StagePlan]) -> None:
    """A run may not start from a checkpoint that it is about to replace. Raises ValueError."""
    fresh = [stage for stage in config.job.stages if stage not in plans or plans[stage].fresh]
    for key, value in _named_checkpoints(config):
        source = Path(value).resolve()
        for name in replaced_by(fresh):
            replaced = (config.root / name).resolve()
            if source == replaced or replaced in source.parents:
                raise ValueError(
                    f"{key}={value} lies in {replaced}, which job={config.job.name} replaces: copy it elsewhere or "
                    "choose another run_root"
                )


def _named_checkpoints(config: RunConfig) -> list[tuple[str, str]]:
    """(config key, value) of the checkpoints that the user named."""
    named = [("model.path", config.model.path), ("algorithm.init", config.algorithm.init)]
    named += [("eval.checkpoint", config.eval.checkpoint), ("algorithm.reference", config.algorithm.reference)]
    return [(key, value) for key, value in named if value not in ("", "auto", "best")]

"""What can be known before any actor starts: derived quantities, missing inputs, settings that a checkpoint brings.

Invariant: whatever fails here has cost nothing yet and deleted nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from conf.age import age_bound
from conf.schema import RunConfig
from runtime.starting_point import model_folder, own_checkpoints
from runtime.store.manifests import StagePlan, replaced_by
from streams.checkpoint.folder import FAMILIES, is_hub_id, model_type, token_side
from streams.checkpoint.weights import check_weights
from streams.data.dataset import load_tasks
from streams.log.record import BYTES_PER_TOKEN
from streams.memory import check_args_taken, check_text_tells_time, live_bound, make_policy
from streams.task import StreamTask


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


def check_memory_policy(config: RunConfig) -> None:
    """Raises ValueError, with the config key, for a memory that cannot work with this backbone or these frames.

    What a hub id turns out to be is asked again before its weights are loaded (runtime.planning.device_plan).
    """
    check_args_taken(config.memory)
    policy, video = make_policy(config.memory), config.data.video
    check_text_tells_time(policy, writes_time(config))
    chunk = video.frames_per_chunk // 2 * max(1, video.max_pixels // pixels_per_token(config))
    turn = chunk + config.layout.max_new_tokens
    live_bound(policy, per_turn=turn, fixed=0, video_per_turn=chunk, turns=config.data.max_turns)


Rows = Mapping[str, tuple[StreamTask, ...] | None]
"""By split, the rows of a file that a job reads; None = they are still to be generated."""


def check_inputs(config: RunConfig) -> Rows:
    """Raise ValueError or FileNotFoundError for what would fail later. Returns the rows of the files that the job reads."""
    if config.root.exists() and not config.root.is_dir():
        raise ValueError(f"run_root={config.run_root} is a file: name a folder, new or of an earlier run")
    age_bound(config)
    rows = _check_data(config)
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
    return rows


def _check_folder(key: str, folder: Path) -> None:
    """A hub id is checked when it has been resolved, before an actor loads it (runtime.run)."""
    try:
        check_weights(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{key}: {error}") from error


def _check_data(config: RunConfig) -> Rows:
    """The rows by split. Raises FileNotFoundError or ValueError for a file that holds none."""
    stages = set(config.job.stages)
    needed = [split for split, by in (("train", {"sft", "rl"}), ("heldout", {"eval"})) if stages & by]
    if config.eval.every and "rl" in stages and "heldout" not in needed:
        needed.append("heldout")
    rows: dict[str, tuple[StreamTask, ...] | None] = {}
    for split in needed:
        rows[split] = None
        given = getattr(config.data, split)
        path = Path(given) if given else config.root / "data" / f"{split}.jsonl"
        if given or "data" not in stages:
            if not path.is_file():
                how = f"set data.{split} to a JSONL file" if given else f"set data.{split} or run job=data first"
                raise FileNotFoundError(f"data.{split}: {path} does not exist ({how})")
            # Rows are read again, and bad ones named, when a stage uses them; a file without one usable row ends here.
            data = config.data
            rows[split] = load_tasks(path, format=data.format, ignore_fields=data.ignore_fields).tasks
    return rows


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

"""Checks before any actor starts: derived quantities, missing inputs, a memory policy that cannot work.

Invariants:
* a check that fails has deleted nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from conf.age import age_bound
from conf.schema import RunConfig
from runtime.planning.stream_size import StreamSize
from runtime.starting_point import StartingPoint
from streams.data.dataset import TaskFile, load_tasks
from streams.log.record import BYTES_PER_TOKEN
from streams.memory import check_args_taken, check_text_tells_time, make_policy


def largest_stream(config: RunConfig, start: StartingPoint) -> StreamSize:
    """Return the largest stream that the settings allow, before the rows and the model are read."""
    return StreamSize.possible(config, token_side=start.token_side, timestamps=start.writes_time)


def describe(config: RunConfig, start: StartingPoint) -> list[str]:
    """Return the lines about a run's derived quantities that are printed before it starts."""
    algorithm = config.algorithm
    age = age_bound(config)
    log_kib = BYTES_PER_TOKEN * largest_stream(config, start).tokens / 1024
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


def check_memory_policy(config: RunConfig, start: StartingPoint) -> None:
    """Raise ValueError, with the config key, for a memory policy that cannot work with this backbone or these frames.

    A hub id's model is not known yet: `runtime.planning.device_plan` checks again before its weights are loaded.
    """
    check_args_taken(config.memory)
    check_text_tells_time(make_policy(config.memory), start.writes_time)
    largest_stream(config, start).live(config)


Rows = Mapping[str, TaskFile | None]
"""By split, what the file holds that a job reads; None = it is yet to be generated."""


def check_inputs(config: RunConfig, start: StartingPoint) -> Rows:
    """Raise ValueError or FileNotFoundError for what would fail later. Returns the rows of the files that the job reads."""
    check_root(config)
    age_bound(config)
    rows = {split: check_rows(config, split) for split in needed_splits(config)}
    start.check()
    return rows


def content_of(rows: Rows) -> str | None:
    """Return the digest of the training rows that were read; None if there are none yet."""
    train = rows.get("train")
    return None if train is None else train.digest


def check_root(config: RunConfig) -> None:
    """Raise ValueError for a run_root that cannot be a folder."""
    if config.root.exists() and not config.root.is_dir():
        raise ValueError(f"run_root={config.run_root} is a file: name a folder, new or of an earlier run")


def needed_splits(config: RunConfig) -> list[str]:
    """Return which task files the job reads: `train`, `heldout`."""
    stages = set(config.job.stages)
    needed = [split for split, by in (("train", {"sft", "rl"}), ("heldout", {"eval"})) if stages & by]
    if config.eval.every and "rl" in stages and "heldout" not in needed:
        needed.append("heldout")
    return needed


def check_rows(config: RunConfig, split: str) -> TaskFile | None:
    """Return the rows of a file; None if they are yet to be generated.

    Raises FileNotFoundError for a missing file, ValueError for one without rows.
    """
    given = getattr(config.data, split)
    path = Path(given) if given else config.root / "data" / f"{split}.jsonl"
    if not given and "data" in config.job.stages:
        return None
    if not path.is_file():
        how = f"set data.{split} to a JSONL file" if given else f"set data.{split} or run job=data first"
        raise FileNotFoundError(f"data.{split}: {path} does not exist ({how})")
    # Bad rows are named when a stage uses them; a file without one usable row ends here.
    data = config.data
    return load_tasks(path, format=data.format, ignore_fields=data.ignore_fields, root=data.root)

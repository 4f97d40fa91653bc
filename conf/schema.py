"""The typed schema of a run: every Hydra key, its type and what it must satisfy.

Worker-level settings stand next to the class they configure; this module adds the jobs' own and assembles
them. Invariants: an unknown key is an error that names it; impossible combinations are refused here, before any actor.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.monitor import MonitorConfig
from conf.paths import expand_homes
from conf.platform import CheckpointConfig, ClusterConfig, TrackingConfig, WeightsConfig
from learner.config import LearnerConfig
from rewards.compose import RewardConfig
from rollout.config import RolloutConfig
from streams.dataset import FORMATS
from streams.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.model_config import ModelConfig
from streams.synthetic import SyntheticConfig
from streams.task import StreamTask
from streams.video import VideoConfig

STAGES = ("data", "sft", "rl", "eval", "watch")


@dataclass(frozen=True)
class JobConfig:
    """`job=NAME`: the stages it runs, in order."""

    name: str = "all"
    stages: list[str] = field(default_factory=lambda: ["data", "sft", "rl", "eval"])

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"job.stages={self.stages}: stages are {', '.join(STAGES)}")
        if "watch" in self.stages and len(self.stages) > 1:
            raise ValueError(f"job.stages={self.stages}: watch runs alone")


@dataclass(frozen=True)
class DataConfig:
    """train, heldout: JSONL files; empty = the generator's, under run_root/data.

    format: what the rows look like; `auto` goes by the first one. ignore_fields: fields that rows may hold unread.
    """

    train: str = ""
    heldout: str = ""
    format: str = "auto"
    ignore_fields: list[str] = field(default_factory=list)
    tail_chunks: int = 5
    max_turns: int = 240
    cache_mb: int = 256
    video: VideoConfig = field(default_factory=VideoConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.tail_chunks < 0 or self.max_turns < 1 or self.cache_mb < 1:
            raise ValueError(
                f"data.tail_chunks={self.tail_chunks} must be >= 0, data.max_turns={self.max_turns} and "
                f"data.cache_mb={self.cache_mb} at least 1"
            )
        if self.format not in FORMATS:
            raise ValueError(f"data.format={self.format!r} is not one of {', '.join(FORMATS)}")
        if bool(self.train) != bool(self.heldout):
            raise ValueError("data.train and data.heldout must be set together, or both left to the generator")

    def turns_of(self, task: StreamTask) -> int:
        """Chunks that a stream over this task is shown."""
        return task.num_turns(self.video.chunk_seconds_of(task), self.tail_chunks, self.max_turns)


def check_length(job: str, steps: int, epochs: float) -> None:
    """A stage's length is given either in optimiser steps or in passes over its tasks."""
    if steps < 0 or not (math.isfinite(epochs) and epochs >= 0):
        raise ValueError(f"{job}.steps={steps} and {job}.epochs={epochs} must not be negative")
    if bool(steps) == bool(epochs):
        raise ValueError(
            f"{job}.steps={steps} and {job}.epochs={epochs}: exactly one of them must be above 0, the other 0"
        )


def optimiser_steps(steps: int, epochs: float, tasks: int, batch: int) -> int:
    """`steps`, or as many as it takes to pass `epochs` times over the tasks, `batch` a step; the last may wrap around."""
    if tasks < 1 or batch < 1:
        raise ValueError(f"{tasks} usable tasks and a batch of {batch}: both must be at least 1")
    # 0.1 * 30 tasks is 3.0000000000000004: that is three tasks, not a part of a fourth.
    return steps or math.ceil(epochs * tasks / batch - 1e-9)


def warmup_steps(ratio: float, total: int) -> int:
    """Warm-up of `ratio` of all steps, rounded up."""
    return math.ceil(ratio * total - 1e-9)


@dataclass(frozen=True)
class SftConfig:
    """Cold start. steps or epochs (the other is 0): its length. warmup_ratio: share of the steps in which the learning
    rate rises, in place of learner.warmup_steps (0 = those).

    late_*: a demonstration speaks late by a uniform number of chunks with this probability. answer_weight: loss weight
    of the words of an answer, which are few beside thoughts and tags. pending_thought: how a thought reads while an
    answer is due and not yet said ("{thought}" and "{answer}" are filled in; empty = unchanged). learner: values that
    replace single `learner` settings during the cold start.
    """

    steps: int = 60
    epochs: float = 0.0
    batch: int = 16
    warmup_ratio: float = 0.0
    late_probability: float = 0.0
    late_min: int = 1
    late_max: int = 4
    balance_decisions: bool = True
    decision_weight_clamp: float = 20.0
    answer_weight: float = 1.0
    pending_thought: str = ""
    learner: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_length("sft", self.steps, self.epochs)
        if self.batch < 1:
            raise ValueError(f"sft.batch={self.batch} must be at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"sft.warmup_ratio={self.warmup_ratio} must lie in [0, 1]")
        if not 0 <= self.late_probability <= 1:
            raise ValueError(f"sft.late_probability={self.late_probability} must lie in [0, 1]")
        try:
            self.pending_thought.format(thought="", answer="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"sft.pending_thought={self.pending_thought!r} may use {{thought}} and {{answer}} only: {error!r}"
            ) from error
        if not 1 <= self.late_min <= self.late_max:
            raise ValueError(f"sft.late_min={self.late_min} and sft.late_max={self.late_max}: 1 <= min <= max")
        if not (0 < self.decision_weight_clamp < math.inf and 0 < self.answer_weight < math.inf):
            raise ValueError(
                f"sft.decision_weight_clamp={self.decision_weight_clamp} and sft.answer_weight={self.answer_weight} "
                "must be positive numbers"
            )


@dataclass(frozen=True)
class AlgorithmConfig:
    """RL. groups_per_step x group_size streams make one optimiser step; groups_in_flight bounds their age.

    mode: `async`, or `sync` = a step's groups are admitted when every worker runs the step's weights (age 0).
    steps or epochs (the other is 0): its length. warmup_ratio: as `sft.warmup_ratio`.
    kl_coef: weight of the KL to a frozen reference (0 = none is held). reference: `auto` = the checkpoint that RL starts
    from (also after a resume), or a folder. It costs every learner rank the model's parameters once more.
    """

    name: str = "grpo"
    mode: str = "async"
    steps: int = 40
    epochs: float = 0.0
    warmup_ratio: float = 0.0
    groups_per_step: int = 8
    group_size: int = 8
    groups_in_flight: int = 16
    advantage: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    reference: str = "auto"
    init: str = "auto"

    def __post_init__(self) -> None:
        if self.name != "grpo":
            raise ValueError(f"algorithm.name={self.name!r}: only grpo is supported so far")
        if self.mode not in ("async", "sync"):
            raise ValueError(f"algorithm.mode={self.mode!r} is not one of async, sync")
        check_length("algorithm", self.steps, self.epochs)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"algorithm.warmup_ratio={self.warmup_ratio} must lie in [0, 1]")
        for key in ("groups_per_step", "group_size", "groups_in_flight"):
            if getattr(self, key) < 1:
                raise ValueError(f"algorithm.{key}={getattr(self, key)} must be at least 1")
        if self.advantage not in ("grpo", "mean"):
            raise ValueError(f"algorithm.advantage={self.advantage!r} is not one of grpo, mean")
        if self.group_size == 1:
            raise ValueError(
                f"algorithm.group_size=1 with algorithm.advantage={self.advantage}: the advantage of a group of one is "
                "always 0, nothing would be learned; use at least 2 streams a group"
            )
        if not (0 < self.clip_low < 1 and 0 < self.clip_high < math.inf):
            raise ValueError(
                f"algorithm.clip_low={self.clip_low} must lie in (0, 1), algorithm.clip_high={self.clip_high} above 0"
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"algorithm.kl_coef={self.kl_coef} must be 0 or a positive number")
        if not self.reference:
            raise ValueError("algorithm.reference is empty: use auto or a checkpoint folder")


@dataclass(frozen=True)
class EvalConfig:
    """checkpoint: `auto` = what the run has made (after SFT and after RL), or a folder. conditions: also evaluate the
    recall questions with forced empty thoughts and under `recent_frames` with the same window. score_logs: have the learner
    score the evaluation's logs (`monitor` has the limits).
    every: RL steps between evaluations while training (0 = none), of the first `tasks` held-out tasks (0 = all);
    `checkpoints/rl/best` keeps the checkpoint with the largest `best` of them (reward, timing, accuracy_<category>).
    transcripts: streams written under run_root/transcripts (0 = none). transcript_mb: size of their page, at most.
    """

    checkpoint: str = "auto"
    every: int = 0
    tasks: int = 0
    best: str = "reward"
    conditions: bool = True
    score_logs: bool = True
    transcripts: int = 24
    transcript_mb: float = 8.0

    def __post_init__(self) -> None:
        if self.transcripts < 0:
            raise ValueError(f"eval.transcripts={self.transcripts} must be a number of streams, 0 for none")
        if not 0.25 <= self.transcript_mb <= 512:
            raise ValueError(f"eval.transcript_mb={self.transcript_mb} must lie in [0.25, 512]")
        if self.every < 0 or self.tasks < 0:
            raise ValueError(f"eval.every={self.every} and eval.tasks={self.tasks} must not be negative")
        if self.best not in ("reward", "timing") and not self.best.startswith("accuracy_"):
            raise ValueError(f"eval.best={self.best!r} is not one of reward, timing, accuracy_all, accuracy_<category>")


@dataclass(frozen=True)
class WatchConfig:
    """job=watch: stream a file through the engine. at: second at which the query arrives; seconds: how long to watch
    (0 = the whole file). json: print one JSON line per turn instead of words.
    """

    video: str = ""
    query: str = ""
    at: float = 0.0
    seconds: float = 0.0
    json: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.at < math.inf and 0 <= self.seconds < math.inf):
            raise ValueError(
                f"watch.at={self.at} and watch.seconds={self.seconds} must be numbers of seconds, not negative"
            )
        if self.query and 0 < self.seconds <= self.at:
            raise ValueError(
                f"watch.at={self.at:g} with watch.seconds={self.seconds:g}: the query would come after the last second "
                "watched; raise seconds, or leave it out to watch the whole file"
            )


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Every path derives from `run_root`.

    resume: `auto` skips finished stages and goes on with an interrupted one, `never` starts over (and replaces), a
    checkpoint folder goes on from there. deterministic: RL whose losses do not depend on timing (needs mode=sync).
    deviations: how a preset differs from what it reproduces, in words; printed at start.
    """

    run_root: str = "outputs/run"
    seed: int = 0
    resume: str = "auto"
    deterministic: bool = False
    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    deviations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.resume:
            raise ValueError("resume is empty: auto, never, or the folder of a checkpoint")
        if self.deterministic and self.algorithm.mode != "sync":
            raise ValueError(
                f"deterministic=true needs algorithm.mode=sync, not {self.algorithm.mode}: what a worker samples "
                "asynchronously depends on when new weights reach it"
            )
        if not self.run_root:
            raise ValueError("run_root is empty: name the folder that this run writes to")
        cold_start = self.learner.with_overrides(self.sft.learner)
        if cold_start.ranks != self.learner.ranks:
            raise ValueError(
                f"sft.learner.ranks={cold_start.ranks} differs from learner.ranks={self.learner.ranks}: one set of learner "
                "actors serves all stages"
            )
        generated = "data" in self.job.stages and not self.data.train
        if generated and "window" in self.memory.takes and self.data.synthetic.window < self.memory.window:
            raise ValueError(
                f"data.synthetic.window={self.data.synthetic.window} is smaller than memory.window="
                f"{self.memory.window}: recall questions would be asked while their answer is still in memory"
            )

    @property
    def root(self) -> Path:
        return Path(self.run_root)

    @property
    def streams_per_step(self) -> int:
        return self.algorithm.groups_per_step * self.algorithm.group_size

    def sft_steps(self, tasks: int) -> int:
        """Optimiser steps of the cold start on that many usable tasks."""
        return optimiser_steps(self.sft.steps, self.sft.epochs, tasks, self.sft.batch)

    def rl_steps(self, tasks: int) -> int:
        """Optimiser steps of the RL stage on that many usable tasks."""
        algorithm = self.algorithm
        return optimiser_steps(algorithm.steps, algorithm.epochs, tasks, algorithm.groups_per_step)

    def sft_learner(self, steps: int) -> LearnerConfig:
        """The learner's settings for a cold start of `steps` steps."""
        return self._warmed(self.learner.with_overrides(self.sft.learner), self.sft.warmup_ratio, steps)

    def rl_learner(self, steps: int) -> LearnerConfig:
        """The learner's settings for an RL stage of `steps` steps."""
        return self._warmed(self.learner, self.algorithm.warmup_ratio, steps)

    @staticmethod
    def _warmed(learner: LearnerConfig, ratio: float, steps: int) -> LearnerConfig:
        return learner.with_overrides({"warmup_steps": warmup_steps(ratio, steps)}) if ratio else learner

    def notes(self) -> list[str]:
        """What a reader of this run's figures must know: printed at start."""
        notes = self.memory.notes()
        if "window" in self.memory.takes and self.memory.window >= self.data.max_turns:
            notes.append(
                f"note: memory.window={self.memory.window} is not below data.max_turns={self.data.max_turns}: no stream is "
                "long enough for its video to leave"
            )
        for key, learner in (("sft", self.sft_learner(100)), ("rl", self.rl_learner(100))):
            if key in self.job.stages and learner.schedule == "constant" and learner.warmup_steps:
                notes.append(f"note: {key} has no warm-up, learner.schedule=constant: constant_with_warmup has one")
        if self.data.video.max_chunks:
            notes.append(
                f"warning: data.video.max_chunks={self.data.video.max_chunks} sets the chunk length by the length of "
                "each video (ceil(seconds / max_chunks)): this is not causal, a live stream cannot do it"
            )
        return [*notes, *(f"deviation: {deviation}" for deviation in self.deviations)]


def load_config(raw: DictConfig) -> RunConfig:
    """Validate a composed Hydra config. Raises ValueError that names the key, for unknown keys and wrong values alike."""
    schema = OmegaConf.structured(RunConfig)
    _unlock(schema)
    try:
        merged = OmegaConf.merge(schema, raw)
        assert isinstance(merged, DictConfig)
        expand_homes(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{getattr(error, 'full_key', None) or 'config'}: {first}") from error
    assert isinstance(config, RunConfig)
    if config.cluster.existing and not os.path.isabs(config.run_root):
        raise ValueError(
            f"run_root={config.run_root}: on an existing cluster (cluster.address, `ray job submit`) it must be an absolute "
            "path that every node sees; a relative one would land in a cache folder of the job and be lost"
        )
    return config


def _unlock(node: DictConfig) -> None:
    """OmegaConf makes frozen dataclasses read-only even for merging defaults with overrides."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)

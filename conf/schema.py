"""The typed schema of a run: every Hydra key, its type and what it must satisfy.

Worker-level settings are defined next to the class that they configure; this module assembles them with those of the jobs.

Invariants:
* an unknown key is an error that names it;
* impossible combinations are refused here, before any actor starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hydra.conf import HydraConf, RunDir, SweepDir
from hydra.conf import JobConf as HydraJob
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.data import DataConfig
from conf.jobs import EvalConfig, JobConfig, WatchConfig
from conf.monitor import MonitorConfig
from conf.paths import expand_homes
from conf.platform import CheckpointConfig, ClusterConfig, TrackingConfig, WeightsConfig
from conf.training import AlgorithmConfig, SftConfig, optimiser_steps, warmup_steps
from learner.config import LearnerConfig
from rewards.compose import RewardConfig
from rollout.config import RolloutConfig
from streams.backbone.config import ModelConfig
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Every path derives from `run_root`."""

    run_root: str = "outputs/run"
    """Folder that the run writes to: data, checkpoints, journals, logs. On an existing cluster, an absolute path
    that every node sees.
    """
    seed: int = 0
    """Seed of clips, tiny weights, task order, demonstrations and sampling."""
    resume: str = "auto"
    """`auto` skips finished stages and continues the interrupted one; `never` starts over and replaces what is
    there; a checkpoint folder continues from that checkpoint.
    """
    deterministic: bool = False
    """Make the losses of RL independent of timing. Needs `algorithm.mode=sync`."""
    job: JobConfig = field(default_factory=JobConfig)
    """Which stages run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint that is trained."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Which tokens of a stream leave the KV cache."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """What a turn looks like in tokens."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows and videos."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The workers that sample streams."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The ranks that train."""
    sft: SftConfig = field(default_factory=SftConfig)
    """The cold start."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """The RL stage."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a stream is worth."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How new weights reach the workers."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out evaluation and transcripts."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What a run watches itself for."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written, and what a SIGTERM does."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray, and where the actors are placed."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """`job=watch`: one file through the engine."""
    deviations: list[str] = field(default_factory=list)
    """How a preset differs from what it reproduces, one sentence each; printed at start."""

    def __post_init__(self) -> None:
        if not self.resume:
            raise ValueError("resume is empty: auto, never, or the folder of a checkpoint")
        if self.deterministic and self.algorithm.mode != "sync":
            raise ValueError(
                f"deterministic=true needs algorithm.mode=sync, not {self.algorithm.mode}: what a worker samples "
                "asynchronously depends on when new weights reach it"
            )
        if self.deterministic and self.algorithm.zero_spread != "train":
            raise ValueError(
                f"deterministic=true needs algorithm.zero_spread=train, not {self.algorithm.zero_spread}: which groups "
                "are given up before algorithm.resample_most is reached depends on which are scored first"
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
    def least_workers(self) -> int:
        """Rollout workers that the run begins and goes on with at least; where groups belong to workers, all."""
        return self.rollout.workers if self.deterministic else self.rollout.min_workers

    @property
    def streams_per_step(self) -> int:
        return self.algorithm.groups_per_step * self.algorithm.group_size

    def sft_steps(self, tasks: int) -> int:
        """Return the optimiser steps of the cold start on that many usable tasks."""
        return optimiser_steps(self.sft.steps, self.sft.epochs, tasks, self.sft.batch)

    def rl_steps(self, tasks: int) -> int:
        """Return the optimiser steps of the RL stage on that many usable tasks."""
        algorithm = self.algorithm
        return optimiser_steps(algorithm.steps, algorithm.epochs, tasks, algorithm.groups_per_step)

    def sft_learner(self, steps: int) -> LearnerConfig:
        """Return the learner's settings for a cold start of `steps` steps."""
        return self._warmed(self.learner.with_overrides(self.sft.learner), self.sft.warmup_ratio, steps)

    def rl_learner(self, steps: int) -> LearnerConfig:
        """Return the learner's settings for an RL stage of `steps` steps."""
        return self._warmed(self.learner, self.algorithm.warmup_ratio, steps)

    @staticmethod
    def _warmed(learner: LearnerConfig, ratio: float, steps: int) -> LearnerConfig:
        return learner.with_overrides({"warmup_steps": warmup_steps(ratio, steps)}) if ratio else learner

    def notes(self) -> list[str]:
        """Return what a reader of this run's figures must know; printed at start."""
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


def register_schema() -> None:
    """Give Hydra the typed defaults of every key, and its own settings, which hold for any --config-name."""
    store = ConfigStore.instance()
    store.store(name="schema", node=OmegaConf.to_container(OmegaConf.structured(RunConfig)))
    # Hydra writes nothing and sets up no logging: everything is under run_root.
    quiet = HydraConf(
        run=RunDir("."), sweep=SweepDir(dir=".", subdir="."), output_subdir=None, job=HydraJob(chdir=False)
    )
    chosen = {"job_logging": "none", "hydra_logging": "none", "output": None}
    quiet.defaults = [{name: chosen.get(name, option) for name, option in entry.items()} for entry in quiet.defaults]
    store.store(group="hydra", name="config", node=quiet, provider="sightline")


def load_config(raw: DictConfig) -> RunConfig:
    """Validate a composed Hydra config. Raises ValueError that names the key, for unknown keys and wrong values alike."""
    try:
        merged = OmegaConf.merge(_schema(), raw)
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


@cache
def _schema() -> DictConfig:
    """Return the writable schema, made once: a merge copies what it merges into."""
    schema = OmegaConf.structured(RunConfig)
    _unlock(schema)
    return schema


def _unlock(node: DictConfig) -> None:
    """Make a node writable: OmegaConf makes frozen dataclasses read-only even for merging defaults with overrides."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)

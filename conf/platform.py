"""Typed settings of the platform: weights on their way, checkpoints, tracking, cluster (Hydra keys of the same names)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

PLACEMENTS = ("auto", "colocated", "separated", "cpu")

MAX_EXPERIMENT = 500
"""Longest name of an experiment that MLflow accepts, in characters."""

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the programs that `ray job submit` starts."""


@dataclass(frozen=True)
class WeightsConfig:
    """How new weights reach the rollout workers."""

    max_lag: int = 1
    """Versions that a worker may be behind the learner and still get a new task. Part of the age bound (see
    `algorithm.groups_in_flight`).
    """
    staging: str = "device"
    """Where fetched weights wait for the swap: `device`, beside the running ones (shortest pause), `host` (less GPU
    memory), or `auto` = the device, unless the KV pool is larger without.
    """

    def __post_init__(self) -> None:
        if self.staging not in ("auto", "device", "host"):
            raise ValueError(f"weights.staging={self.staging!r} is not one of auto, device, host")
        if self.max_lag < 0:
            raise ValueError(f"weights.max_lag={self.max_lag} must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """When SFT and RL write checkpoints, what of them is kept, and how a SIGTERM ends the run."""

    every: int = 20
    """Optimiser steps between checkpoints (0 = only at the end of each stage)."""
    keep: int = 2
    """Checkpoints of a stage that stay on disk; the best one of RL is kept besides."""
    optimizer: str = "all"
    """Which kept checkpoints have optimiser state: `all`, only the `latest`, or `none`. Resuming without it
    starts with fresh moments.
    """
    keep_rollouts: bool = False
    """Keep the finished rollouts that are not trained yet with each checkpoint, clips included: a run that goes on from it
    trains on them, instead of rolling them out again.
    """
    grace_s: float = 60.0
    """Seconds from SIGTERM to the end of the process: the time there is for a last checkpoint."""
    deadline_s: float = 1800.0
    """Seconds after which a checkpoint that is still being written is given up, as one that failed."""
    most_failures: int = 3
    """Checkpoints of a stage that may fail in a row before the run ends: what it trains then would be lost. 0 = any number."""
    requeue_status: int = 75
    """Exit status after SIGTERM, from 1 to 255: the one that tells the scheduler to run the same command again."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every={self.every} must not be negative")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be at least 1")
        if self.optimizer not in ("all", "latest", "none"):
            raise ValueError(f"checkpoint.optimizer={self.optimizer!r} is not one of all, latest, none")
        if not 0 < self.deadline_s < math.inf or self.most_failures < 0:
            raise ValueError(
                f"checkpoint.deadline_s={self.deadline_s} must be a positive number of seconds and checkpoint.most_failures="
                f"{self.most_failures} not negative"
            )
        if not 0 < self.grace_s < math.inf or not 1 <= self.requeue_status <= 255:
            raise ValueError(
                f"checkpoint.grace_s={self.grace_s} must be positive and checkpoint.requeue_status="
                f"{self.requeue_status} in 1..255"
            )


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow. Its failures never stop training."""

    enabled: bool = True
    """Log to MLflow."""
    uri: str = field(default="", repr=False)
    """Tracking address of MLflow; empty = a SQLite file under `run_root`. A password in it is used to connect and
    never shown; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD keep it off the command line.
    """
    experiment: str = "sightline"
    """Name of the MLflow experiment, 1 to 500 characters."""

    def __post_init__(self) -> None:
        if not self.experiment.strip() or len(self.experiment) > MAX_EXPERIMENT:
            raise ValueError(
                f"tracking.experiment={self.experiment[:40]!r} must be a name of 1 to {MAX_EXPERIMENT} characters"
            )


@dataclass(frozen=True)
class ClusterConfig:
    """Ray, where the actors are placed, and how long a run waits for them."""

    address: str = ""
    """Ray cluster to use: empty = start a local one (or use the one in which `ray job submit` started this
    program), `auto` = the one that RAY_ADDRESS names or that runs on this machine, HOST:PORT = the head of
    another one.
    """
    placement: str = "auto"
    """`colocated` = workers on the learner ranks' GPUs, `separated` = a GPU for each actor, `cpu`, or `auto` =
    the first of separated, colocated and cpu for which the cluster has the GPUs.
    """
    num_cpus: int = 0
    """CPUs of the local Ray (0 = all of the machine). Not with an existing cluster."""
    actor_cpus: float = 0.25
    """CPUs that each actor reserves; a fraction is allowed."""
    start_timeout_s: float = 180.0
    """Seconds to wait at start until every node and every actor answers, and until other runs free what the
    actors need.
    """
    call_timeout_s: float = 600.0
    """Longest single call to an actor, in seconds: a group, an optimiser step, a save."""
    hang_s: float = 300.0
    """Seconds without a sign of life after which a rollout worker or learner is ended, as if it had died: its process does not
    answer, or one visit of a worker's engine lasts that long (the first ones compile and capture kernels).
    """
    wait_s: float = 1800.0
    """Seconds that a run waits for nodes with room, once it has lost some: for the learner, and while fewer than
    `rollout.min_workers` rollout workers have room. Then it ends.
    """
    learner_restarts: int = 3
    """How often in a run a learner that died is started again, with new rollout workers, from the newest checkpoint. A second
    death that comes no further than the one before ends the run all the same. 0: the first death ends it.
    """
    preemptions: int = 20
    """How often in a run a learner is started again that something outside took away: a node that was drained or lost, SIGTERM.
    """
    log_to_driver: bool = False
    """Also print on the driver's terminal what actors print."""

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"cluster.placement={self.placement!r} is not one of {', '.join(PLACEMENTS)}")
        if self.num_cpus < 0 or not 0 < self.actor_cpus < math.inf:
            raise ValueError(
                f"cluster.num_cpus={self.num_cpus} must be >= 0 and cluster.actor_cpus={self.actor_cpus} > 0"
            )
        for key in ("learner_restarts", "preemptions"):
            if getattr(self, key) < 0:
                raise ValueError(f"cluster.{key}={getattr(self, key)} must be a number of restarts, at least 0")
        for key in ("start_timeout_s", "call_timeout_s", "hang_s", "wait_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"cluster.{key}={getattr(self, key)} must be a positive number of seconds")
        if "://" in self.address:
            raise ValueError(
                f"cluster.address={self.address}: the driver has to run on a node of the cluster, so this is not an URL; "
                "use auto or HOST:PORT there, or from elsewhere `ray job submit --address http://HEAD:8265 ...`"
            )
        if self.address not in ("", "auto") and not self.address.rpartition(":")[2].isdigit():
            raise ValueError(
                f"cluster.address={self.address!r} is neither auto nor HOST:PORT (the head's port, e.g. 6379)"
            )
        if self.address and self.num_cpus:
            raise ValueError(
                f"cluster.num_cpus={self.num_cpus} sizes a local Ray; the cluster at cluster.address={self.address} has "
                "the CPUs that its nodes were started with"
            )

    @property
    def existing(self) -> str:
        """Address of the existing cluster to use; empty = start a local Ray."""
        return self.address or ("auto" if RAY_JOB_VARIABLE in os.environ else "")

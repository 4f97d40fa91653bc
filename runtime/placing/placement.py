"""Which actor gets how much of a GPU. Pure.

Invariants:
* Ray never puts two learner ranks on one GPU, which NCCL refuses;
* a placement that was asked for by name is what the run gets, or the run stops with the arithmetic.
"""

from __future__ import annotations

import math

from conf.schema import RunConfig
from runtime.placing.preflight import Bundle

RANK_SHARE = 0.6
"""A learner rank's part of a GPU that it shares: more than half, so that Ray never puts two ranks on one."""


def resolve_placement(config: RunConfig, cluster_gpus: float) -> str:
    """Return `separated`, `colocated` or `cpu`. Raises ValueError if the configured one needs more GPUs."""
    wanted, gpus = config.cluster.placement, int(cluster_gpus)
    ranks, workers = config.learner.ranks, config.rollout.workers
    if wanted == "cpu":
        return "cpu"
    if wanted == "auto":
        return "separated" if gpus >= ranks + workers else "colocated" if gpus >= ranks else "cpu"
    least = config.least_workers
    need = ranks + least if wanted == "separated" else ranks
    if gpus < need:
        key = "workers" if least == workers else "min_workers"
        parts = f"learner.ranks={ranks}" + (f" + rollout.{key}={least}" if wanted == "separated" else "")
        ways = "cluster.placement=colocated shares them, " if wanted == "separated" and gpus >= ranks else ""
        raise ValueError(
            f"cluster.placement={wanted} needs {need} GPUs ({parts}), the cluster has {gpus}: {ways}cluster.placement=auto "
            "takes what is there, cluster.placement=cpu none; or bring more GPUs"
        )
    return wanted


def gpu_shares(config: RunConfig, cluster_gpus: float) -> tuple[float, float]:
    """Return the GPUs of a learner rank and of a rollout worker, as fractions of one."""
    placement = resolve_placement(config, cluster_gpus)
    if placement == "cpu":
        return 0.0, 0.0
    if placement == "separated":
        return 1.0, 1.0
    # If `colocated` was asked for by name, workers are on the ranks' GPUs; otherwise on all GPUs.
    hosts = config.learner.ranks if config.cluster.placement == "colocated" else int(cluster_gpus)
    # Ray counts in ten thousandths.
    return RANK_SHARE, math.floor((1 - RANK_SHARE) / -(-config.rollout.workers // hosts) * 1e4) / 1e4


def plan_bundles(config: RunConfig, cluster_gpus: float) -> list[Bundle]:
    """Return one bundle per actor: learner ranks, workers, scorers."""
    cpus, ranks = config.cluster.actor_cpus, config.learner.ranks
    rank_gpus, worker_gpus = gpu_shares(config, cluster_gpus)
    learners = [Bundle("learner" if ranks == 1 else f"learner rank {r}", cpus, rank_gpus) for r in range(ranks)]
    least = config.least_workers
    workers = [
        Bundle(f"rollout worker {i}", cpus, worker_gpus, joins=i >= least) for i in range(config.rollout.workers)
    ]
    return [*learners, *workers, *(Bundle(name, cpus, 0.0) for name in scorer_names(config))]


def scorer_names(config: RunConfig) -> list[str]:
    """Return what the bundles of the scorers are called."""
    count = config.reward.workers
    return ["scorer"] if count == 1 else [f"scorer {i}" for i in range(count)]


def placement_note(config: RunConfig, cluster_gpus: float) -> str:
    """Return a note about shared or unused GPUs; '' if there is nothing to note."""
    rank, worker = gpu_shares(config, cluster_gpus)
    if 0 < rank < 1:
        return (
            f"placement: colocated, rollout workers share GPUs with the learner ({rank:g} of one for each rank, {worker:g} for "
            "each worker)"
        )
    if cluster_gpus and not rank and config.cluster.placement != "cpu":
        return (
            f"the cluster's {cluster_gpus:g} GPUs are not used: learner.ranks={config.learner.ranks} needs one for each rank. "
            "Lower learner.ranks to use them"
        )
    return ""

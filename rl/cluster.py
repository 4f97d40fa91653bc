"""The Ray session: one for all stages of a run; it places the actors and names what every wait waits for.

Owner: rl. Invariants: all actors are placed or the run stops at start with the arithmetic; every wait has a timeout;
an actor that died is reported with its name and cause. Actors are separate processes: workers, scorer, learner.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from conf.schema import RunConfig
from learner.worker import LeadLearner, Learner
from rewards.scorer import Scorer
from rl.learners import LearnerGroup
from rollout.worker import RolloutWorker
from streams.messages import LearnerSetup, WorkerInfo, WorkerSetup


@dataclass(frozen=True)
class Bundle:
    """What one actor reserves."""

    name: str
    cpus: float
    gpus: float


def plan_bundles(config: RunConfig, cluster_gpus: float) -> list[Bundle]:
    """One bundle per actor: learner ranks, workers, scorer."""
    cpus = config.cluster.actor_cpus
    wanted = config.learner.ranks + config.rollout.workers
    gpus = 1.0 if config.cluster.placement == "auto" and cluster_gpus >= wanted else 0.0
    workers = [Bundle(f"rollout worker {i}", cpus, gpus) for i in range(config.rollout.workers)]
    ranks = config.learner.ranks
    learners = [Bundle("learner" if ranks == 1 else f"learner rank {r}", cpus, gpus) for r in range(ranks)]
    return [*learners, *workers, Bundle("scorer", cpus, 0.0)]


def check_fits(bundles: list[Bundle], resources: dict[str, float]) -> None:
    """Raises ValueError with the arithmetic if the cluster cannot hold all actors at once."""
    for kind, need in (("CPU", sum(b.cpus for b in bundles)), ("GPU", sum(b.gpus for b in bundles))):
        have = resources.get(kind, 0.0)
        if need > have + 1e-9:
            parts = " + ".join(f"{b.name} {b.cpus if kind == 'CPU' else b.gpus:g}" for b in bundles)
            raise ValueError(
                f"the actors need {need:g} {kind}s ({parts}) but the cluster has {have:g}: lower rollout.workers or "
                "cluster.actor_cpus, or bring a larger cluster"
            )


def wait_for(reference: Any, timeout_s: float, what: str) -> Any:
    """ray.get with a deadline; TimeoutError and RuntimeError say what was waited for and who died of what."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(
            f"waited {timeout_s:g} s for {what}; raise cluster.call_timeout_s if it is only slow"
        ) from error
    except RayActorError as error:
        raise RuntimeError(f"an actor died while the run waited for {what}: {error}") from error


class Session:
    """The running actors. Use as a context manager: leaving it stops what it started."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.worker_infos: tuple[WorkerInfo, ...] = ()
        self._local = not config.cluster.address
        self._group: PlacementGroup | None = None
        self._connect()
        try:
            self._start_actors()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        ray.shutdown()

    def wait_ready(self) -> dict[str, int]:
        """Wait until every actor's process answers; returns their pids by name."""
        timeout = self.config.cluster.start_timeout_s
        pids = {name: wait_for(ref, timeout, f"the {name} to start") for name, ref in self._learner_ready.items()}
        for i, reference in enumerate(self._worker_ready):
            pids[f"rollout worker {i}"] = wait_for(reference, timeout, f"rollout worker {i} to start")
        pids["scorer"] = wait_for(self._scorer_ready, timeout, "the scorer to start")
        return pids

    def setup_workers(self, setup: WorkerSetup) -> tuple[WorkerInfo, ...]:
        references = [worker.setup.remote(setup) for worker in self.workers]
        timeout = self.config.cluster.start_timeout_s
        self.worker_infos = tuple(
            wait_for(reference, timeout, f"rollout worker {i} to load {setup.checkpoint}")
            for i, reference in enumerate(references)
        )
        return self.worker_infos

    def setup_learner(self, setup: LearnerSetup) -> int:
        return self.learners.setup(setup, self.config.cluster.start_timeout_s)

    def call(self, reference: Any, what: str) -> Any:
        return wait_for(reference, self.config.cluster.call_timeout_s, what)

    def spread(
        self, items: Iterable[Any], send: Callable[[Any, Any], Any], per_worker: int, what: str
    ) -> Iterator[tuple[Any, Any]]:
        """Run `send(worker, item)` (returning references, the first of which is waited for) over all workers.

        Yields (item, references) as they finish, with at most `per_worker` under way on each.
        """
        pending: dict[Any, tuple[Any, Any, int]] = {}
        load = [0] * len(self.workers)
        iterator, drained = iter(items), False
        while True:
            while not drained and min(load) < per_worker:
                item = next(iterator, None)
                if item is None:
                    drained = True
                    break
                worker = load.index(min(load))
                references = send(self.workers[worker], item)
                pending[references[0]] = (item, references, worker)
                load[worker] += 1
            if not pending:
                return
            timeout = self.config.cluster.call_timeout_s
            done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
            if not done:
                raise TimeoutError(f"waited {timeout:g} s for {what}: {len(pending)} calls under way, none finished")
            item, references, worker = pending.pop(done[0])
            load[worker] -= 1
            yield item, references

    def _connect(self) -> None:
        cluster = self.config.cluster
        # Ray warns about accelerators that a CPU-only actor hides from itself.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray 2.60 announces that its own token guards the local cluster; nobody has to act on it.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        if cluster.address:
            ray.init(address=cluster.address, log_to_driver=cluster.log_to_driver, logging_level=logging.WARNING)
            return
        ray.init(
            num_cpus=cluster.num_cpus or None,
            include_dashboard=False,
            log_to_driver=cluster.log_to_driver,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"PYTHONPATH": _project_path(), "TOKENIZERS_PARALLELISM": "false"}},
        )

    def _start_actors(self) -> None:
        config = self.config
        resources = ray.cluster_resources()
        bundles = plan_bundles(config, resources.get("GPU", 0.0))
        check_fits(bundles, resources)
        shapes = [{"CPU": b.cpus} | ({"GPU": b.gpus} if b.gpus else {}) for b in bundles]
        group = self._group = placement_group(shapes, strategy="PACK")
        if not group.wait(timeout_seconds=config.cluster.start_timeout_s):
            raise TimeoutError(
                f"waited {config.cluster.start_timeout_s:g} s for Ray to place {len(bundles)} actors "
                f"({', '.join(b.name for b in bundles)}); available now: {ray.available_resources()}"
            )

        def place(actor: type, index: int, threads: int, *args: Any) -> Any:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            # Only rank 0 of several learners answers calls beside its work.
            groups = getattr(actor, "concurrency_groups", None)
            make: Any = ray.remote
            remote = make(concurrency_groups=groups)(actor) if groups else make(actor)
            options = remote.options(
                num_cpus=bundles[index].cpus,
                num_gpus=bundles[index].gpus,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)} | _hidden_gpus(bundles[index])},
            )
            return options.remote(*args)

        timeout = config.cluster.call_timeout_s
        learner_threads = max(config.learner.threads, int(config.sft.learner.get("threads", 1)))
        ranks = config.learner.ranks
        lead = Learner if ranks == 1 else LeadLearner
        actors = [place(lead if rank == 0 else Learner, rank, learner_threads, timeout) for rank in range(ranks)]
        self.learner = actors[0]
        self.learners = LearnerGroup(actors)
        self._learner_ready = dict(zip([b.name for b in bundles], self.learners.warm_up(), strict=False))
        rollout = config.rollout
        self.workers = [
            place(
                RolloutWorker,
                ranks + i,
                rollout.threads,
                i,
                rollout.threads,
                rollout.group_deadline_s,
                config.data.cache_mb,
            )
            for i in range(rollout.workers)
        ]
        self._worker_ready = [worker.pid.remote() for worker in self.workers]
        self.scorer = place(Scorer, len(bundles) - 1, 1, config.reward)
        self._scorer_ready = self.scorer.pid.remote()


def _hidden_gpus(bundle: Bundle) -> dict[str, str]:
    """An actor without a GPU of its own must not find one: it would fight for memory with those that have."""
    return {} if bundle.gpus else {"CUDA_VISIBLE_DEVICES": ""}


def _project_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{root}{os.pathsep}{inherited}" if inherited else root

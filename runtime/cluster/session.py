"""The Ray session, one for all stages of a run: it places the actors, starts them, and waits for their replies.

Invariants:
* no actor starts before the preflight has passed;
* all actors are placed, or the run stops with the arithmetic;
* every wait has a timeout, and its error names what was waited for;
* an actor that died is reported with its name, node, cause and log;
* actors are separate processes (workers, scorer, learner) that end with the driver, however it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from conf.schema import RunConfig
from learner.setup import LearnerSetup
from learner.worker import LeadLearner, Learner
from rewards.scorer import Scorer
from rollout.setup import WorkerInfo, WorkerSetup
from rollout.worker import RolloutWorker
from runtime.cluster.actors import ActorBook, named_class, run_id, short_name
from runtime.cluster.connect import connect
from runtime.cluster.events import CALL_LIMIT, START_LIMIT, wait_for
from runtime.cluster.learners import LearnerGroup
from runtime.cluster.placement import placement_note, plan_bundles
from runtime.cluster.preflight import Bundle, run_preflight
from streams.backbone.tiny_spec import TinySpec
from streams.support.usage import DeviceInfo, ProcessUsage

QUIET_WAIT_S = 2.0
"""How long to wait for resources before saying so."""

log = logging.getLogger("sightline.cluster")


class Session:
    """The running actors. Use as a context manager: leaving it stops what it started."""

    def __init__(
        self,
        config: RunConfig,
        connecting: AbstractContextManager[None] | None = None,
    ) -> None:
        """connecting: entered while Ray is joined or started."""
        self.config = config
        self.worker_infos: tuple[WorkerInfo, ...] = ()
        root = config.root.resolve()
        self.book = ActorBook(run_id(root), root / "logs")
        self._group: PlacementGroup | None = None
        with connecting or nullcontext():
            connect(config.cluster, self.book.namespace, root)
        try:
            gpus = ray.cluster_resources().get("GPU", 0.0)
            bundles = plan_bundles(config, gpus)
            if note := placement_note(config, gpus):
                log.warning(note)
            run_preflight(config, bundles)
            self._start_actors(bundles)
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
        pids = {name: self._started(ref, f"the {name} to start") for name, ref in self._learner_ready.items()}
        for i, reference in enumerate(self._worker_ready):
            pids[f"rollout worker {i}"] = self._started(reference, f"rollout worker {i} to start")
        pids["scorer"] = self._started(self._scorer_ready, "the scorer to start")
        return pids

    def build_tiny(self, folder: Path, spec: TinySpec, seed: int, dtype: str) -> Path:
        """Have a rollout worker, which can load torch, write a random checkpoint to `folder`; return that."""
        built = self.workers[0].build_tiny.remote(str(folder), spec, seed, dtype)
        return Path(self._started(built, f"a rollout worker to write {folder}"))

    def devices(self) -> tuple[list[DeviceInfo], list[DeviceInfo]]:
        """Return the devices of the learner ranks and of the workers, before they load anything."""
        actors = [*self.learners.actors, *self.workers]
        # Asked twice: the first call opens a CUDA context in each process, so only the second sees what they all leave
        # free.
        for _ in range(2):
            replies = [actor.device.remote() for actor in actors]
            found = [self.call(reply, "an actor to describe its device") for reply in replies]
        return found[: len(self.learners.actors)], found[len(self.learners.actors) :]

    def usage(self) -> list[ProcessUsage]:
        """Return where the time and memory of the learner ranks and workers went."""
        replies = [actor.usage.remote() for actor in [*self.learners.actors, *self.workers]]
        return [self.call(reply, "an actor's account of its phases") for reply in replies]

    def setup_workers(self, setup: WorkerSetup) -> tuple[WorkerInfo, ...]:
        references = [worker.setup.remote(setup) for worker in self.workers]
        self.worker_infos = tuple(
            self._started(reference, f"rollout worker {i} to load {setup.checkpoint}")
            for i, reference in enumerate(references)
        )
        return self.worker_infos

    def setup_learner(self, setup: LearnerSetup) -> int:
        return self.learners.setup(setup, self.config.cluster.start_timeout_s)

    def call(self, reference: Any, what: str) -> Any:
        """Return an actor's reply. Raises TimeoutError and RuntimeError, as `wait_for`."""
        return wait_for(reference, self.config.cluster.call_timeout_s, what, self.book.explain, CALL_LIMIT)

    def _started(self, reference: Any, what: str) -> Any:
        """Like `call`, for what may take as long as loading a model."""
        return wait_for(reference, self.config.cluster.start_timeout_s, what, self.book.explain, START_LIMIT)

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

    def _reserve(self, bundles: list[Bundle]) -> PlacementGroup:
        """Reserve one placement group for all actors: they start together or not at all. Raises TimeoutError."""
        shapes = [{"CPU": b.cpus} | ({"GPU": b.gpus} if b.gpus else {}) for b in bundles]
        group = self._group = placement_group(shapes, strategy="PACK", name=self.book.ray_name("actors"))
        timeout = self.config.cluster.start_timeout_s
        if group.wait(timeout_seconds=min(QUIET_WAIT_S, timeout)):
            return group
        # The actors of a killed run end by themselves within seconds, those of another run when it ends.
        log.warning("waiting up to %g s for room for %d actors; free now: %s", timeout, len(bundles), _free())
        if not group.wait(timeout_seconds=timeout):
            raise TimeoutError(
                f"waited {timeout:g} s (cluster.start_timeout_s) for Ray to place {len(bundles)} actors "
                f"({', '.join(b.name for b in bundles)}): other runs hold the rest of the cluster; free now: {_free()}. "
                "`ray list actors --filter state=ALIVE` and `ray list placement-groups` name who holds what"
            )
        return group

    def _start_actors(self, bundles: list[Bundle]) -> None:
        config = self.config
        group = self._reserve(bundles)

        def place(actor: type, index: int, threads: int, *args: Any) -> Any:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            name = short_name(bundles[index].name)
            # Only rank 0 of several learners answers calls beside its work.
            groups = getattr(actor, "concurrency_groups", None)
            make: Any = ray.remote
            named = named_class(actor, name)
            remote = make(concurrency_groups=groups)(named) if groups else make(named)
            environment = {"OMP_NUM_THREADS": str(threads)} | _hidden_gpus(bundles[index]) | self.book.environment(name)
            options = remote.options(
                name=self.book.ray_name(name),
                num_cpus=bundles[index].cpus,
                num_gpus=bundles[index].gpus,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": environment},
            )
            handle = options.remote(*args)
            self.book.add(name, handle)
            return handle

        timeout = config.cluster.call_timeout_s
        learner_threads = max(config.learner.threads, int(config.sft.learner.get("threads", 1)))
        ranks = config.learner.ranks
        lead = Learner if ranks == 1 else LeadLearner
        actors = [place(lead if rank == 0 else Learner, rank, learner_threads, timeout) for rank in range(ranks)]
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
                config.data.cache_mb,
            )
            for i in range(rollout.workers)
        ]
        self._worker_ready = [worker.pid.remote() for worker in self.workers]
        self.scorer = place(Scorer, len(bundles) - 1, 1, config.reward)
        self._scorer_ready = self.scorer.pid.remote()


def _hidden_gpus(bundle: Bundle) -> dict[str, str]:
    """Return the variables that hide GPUs from an actor that has none reserved: it must not take another's memory."""
    return {} if bundle.gpus else {"CUDA_VISIBLE_DEVICES": ""}


def _free() -> str:
    """Return the free CPUs and GPUs of the cluster, in words."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0.0):g} CPUs, {free.get('GPU', 0.0):g} GPUs"

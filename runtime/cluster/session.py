"""The Ray session, one for all stages of a run: it places the actors, starts them, and waits for their replies.

Invariants:
* no actor starts before the preflight has passed;
* all actors are placed, or the run stops with the arithmetic;
* every wait has a timeout, and its error names what was waited for;
* an actor that died is reported with its name, node, cause and log; a rollout worker or scorer is replaced;
* actors are separate processes (workers, scorer, learner) that end with the driver, however it ends.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from conf.schema import RunConfig
from learner.setup import LearnerSetup
from runtime.cluster.actors import ActorBook, run_id
from runtime.cluster.connect import connect
from runtime.cluster.crew import Crew
from runtime.cluster.events import CALL_LIMIT, START_LIMIT, lost_with_an_actor, wait_for
from runtime.cluster.learners import LearnerGroup
from runtime.cluster.maker import ActorMaker
from runtime.cluster.placement import placement_note, plan_bundles
from runtime.cluster.preflight import Bundle, object_stores, run_preflight
from streams.backbone.tiny_spec import TinySpec
from streams.messages import ScoreReport
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
            group = self._reserve(bundles)
            self.stores = object_stores(group, bundles)
            make = self._make = ActorMaker(config, self.book, bundles, group)
            self._start_learner()
            self.crew = Crew(config.cluster, self.book, make, config.rollout.workers)
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

    def restart(self) -> None:
        """Start new processes in the places of the learner's ranks and the rollout workers; none has loaded anything."""
        for rank in self.learners.actors:
            ray.kill(rank)
        self._start_learner()
        for worker in range(len(self.crew.workers)):
            self.crew.replace_worker(worker)

    def wait_ready(self) -> dict[str, int]:
        """Wait until every actor's process answers; returns their pids by name."""
        pids = {name: self._started(ref, f"the {name} to start") for name, ref in self._learner_ready.items()}
        workers = self.crew.of_workers(lambda worker: worker.pid.remote(), "start", start=True)
        pids |= {f"rollout worker {i}": pid for i, pid in enumerate(workers)}
        pids["scorer"] = self.crew.of_scorer(lambda scorer: scorer.pid.remote(), "the scorer to start", start=True)
        return pids

    def build_tiny(self, folder: Path, spec: TinySpec, seed: int, dtype: str) -> Path:
        """Have a rollout worker, which can load torch, write a random checkpoint to `folder`; return that."""
        return Path(
            self.crew.of_worker(
                0,
                lambda worker: worker.build_tiny.remote(str(folder), spec, seed, dtype),
                f"write {folder}",
                start=True,
            )
        )

    def devices(self) -> tuple[list[DeviceInfo], list[DeviceInfo]]:
        """Return the devices of the learner ranks and of the workers, before they load anything."""
        # Asked twice: the first call opens a CUDA context in each process, so only the second sees what they all leave
        # free.
        for _ in range(2):
            replies = [actor.device.remote() for actor in self.learners.actors]
            workers = self.crew.of_workers(lambda worker: worker.device.remote(), "describe its device")
            learners = [self.call(reply, "a learner to describe its device") for reply in replies]
        return learners, workers

    def usage(self) -> list[ProcessUsage | None]:
        """Return where the time and memory of the learner ranks and workers went; None for a worker that died."""
        replies = [actor.usage.remote() for actor in self.learners.actors]
        workers = self.crew.of_living(lambda worker: worker.usage.remote(), "give an account of its phases")
        return [*(self.call(reply, "a learner's account of its phases") for reply in replies), *workers]

    def setup_learner(self, setup: LearnerSetup) -> int:
        return self.learners.setup(setup, self.config.cluster.start_timeout_s)

    def score_logs(self, payloads: tuple[Any, ...], what: str) -> ScoreReport | None:
        """Return the learner's scores of these logs; None if their media went with a worker that died."""
        try:
            report: ScoreReport = self.call(self.learners.score(payloads), what)
        except RayTaskError as error:
            if not lost_with_an_actor(error):
                raise
            return None
        return report

    def call(self, reference: Any, what: str) -> Any:
        """Return an actor's reply. Raises TimeoutError and RuntimeError, as `wait_for`."""
        return wait_for(reference, self.config.cluster.call_timeout_s, what, self.book.explain, CALL_LIMIT)

    def _started(self, reference: Any, what: str) -> Any:
        """Like `call`, for what may take as long as loading a model."""
        return wait_for(reference, self.config.cluster.start_timeout_s, what, self.book.explain, START_LIMIT)

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

    def _start_learner(self) -> None:
        ranks = range(self.config.learner.ranks)
        self.learners = LearnerGroup([self._make.learner(rank) for rank in ranks])
        self._learner_ready = dict(zip(self._make.names, self.learners.warm_up(), strict=False))


def _free() -> str:
    """Return the free CPUs and GPUs of the cluster, in words."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0.0):g} CPUs, {free.get('GPU', 0.0):g} GPUs"

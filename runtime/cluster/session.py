"""The Ray session, one for all stages of a run: it places the actors, starts them, and waits for their replies.

Invariants:
* no actor starts before the preflight has passed;
* all actors that a run begins with are placed, or it stops with the arithmetic; the others start when nodes have room;
* every wait has a timeout, and its error names what was waited for;
* an actor that died is reported with its name, node, cause and log; a rollout worker or scorer is replaced;
* actors are separate processes (workers, scorers, learner) that end with the driver, however it ends.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayTaskError

from conf.schema import RunConfig
from learner.setup import LearnerSetup
from runtime.cluster.actors import ActorBook, run_id
from runtime.cluster.connect import connect
from runtime.cluster.crew import Crew
from runtime.cluster.events import CALL_LIMIT, SLICE_S, START_LIMIT, lost_with_an_actor, wait_for
from runtime.cluster.learners import LearnerGroup
from runtime.cluster.maker import ActorMaker
from runtime.placing.placement import placement_note, plan_bundles, scorer_names
from runtime.placing.preflight import run_preflight
from runtime.placing.seats import NoRoomError, Seats, free
from runtime.planning.object_store import NodeStore
from streams.backbone.tiny_spec import TinySpec
from streams.messages import ScoreReport
from streams.support.usage import DeviceInfo, ProcessUsage

log = logging.getLogger("sightline.cluster")


class Guard(Protocol):
    """Watches the Ray of a session."""

    def connecting(self) -> AbstractContextManager[None]:
        """Entered while Ray is joined or started; it is watched from then on."""

    def close(self) -> None:
        """Watch no more: what ends from now on ends as it should."""


class Session:
    """The running actors. Use as a context manager: leaving it stops what it started."""

    def __init__(
        self,
        config: RunConfig,
        guard: Guard | None = None,
    ) -> None:
        """guard: of the Ray that is joined or started here, until `close`."""
        self.config = config
        root = config.root.resolve()
        self.book = ActorBook(run_id(root), root / "logs")
        self._seats: Seats | None = None
        self._guard = guard
        with guard.connecting() if guard else nullcontext():
            connect(config.cluster, self.book.namespace, root)
        try:
            gpus = ray.cluster_resources().get("GPU", 0.0)
            bundles = plan_bundles(config, gpus)
            if note := placement_note(config, gpus):
                log.warning(note)
            run_preflight(config, bundles)
            seats = self._seats = Seats(bundles, self.book.ray_name("actors"))
            if without := seats.wait(config.cluster.start_timeout_s):
                log.warning(
                    "no node has room for the %s (free now: %s): the run begins without, and takes them in when nodes with "
                    "room join (rollout.workers=%d are wanted, rollout.min_workers=%d needed)",
                    ", ".join(without),
                    free(),
                    config.rollout.workers,
                    config.rollout.min_workers,
                )
            self._make = ActorMaker(config, self.book, seats)
            self._start_learner()
            self.crew = Crew(config, self.book, self._make)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._guard is not None:
            self._guard.close()
        if self._seats is not None:
            self._seats.close()
            self._seats = None
        ray.shutdown()

    def restart(self) -> None:
        """Start new processes in the places of all actors; none has loaded anything."""
        for rank in self.learners.actors:
            ray.kill(rank)
        self._start_learner()
        places = self.crew.places
        for worker in range(len(places.workers)):
            places.replace(worker)
        # One may be at work for the attempt that is over.
        for scorer in range(len(self.crew.scorers.names)):
            self.crew.scorers.replace(scorer)

    def wait_ready(self) -> dict[str, int]:
        """Wait until the process of every actor that has room answers; returns their pids by name. Raises TimeoutError."""
        pids = {
            name: self._started(reference, rank, f"the {name} to start")
            for rank, (name, reference) in enumerate(self._learner_ready.items())
        }
        pids |= {f"rollout worker {worker}": pid for worker, pid in self.crew.gather().items()}
        scorers = scorer_names(self.config)
        return pids | {scorers[place]: pid for place, pid in self.crew.gather_scorers().items()}

    def build_tiny(self, folder: Path, spec: TinySpec, seed: int, dtype: str) -> Path:
        """Have a rollout worker, which can load torch, write a random checkpoint to `folder`; return that."""
        return Path(
            self.crew.of_any_worker(
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
            here = sorted(self.crew.places.here)
            workers = self.crew.of_workers(lambda worker: worker.device.remote(), "describe its device", here)
            learners = [self.call(reply, "a learner to describe its device") for reply in replies]
        return learners, list(workers.values())

    def usage(self) -> list[ProcessUsage | None]:
        """Return where the time and memory of the learner ranks and workers went; None for a worker that died."""
        replies = [actor.usage.remote() for actor in self.learners.actors]
        workers = self.crew.of_living(lambda worker: worker.usage.remote(), "give an account of its phases")
        return [*(self.call(reply, "a learner's account of its phases") for reply in replies), *workers]

    @property
    def stores(self) -> tuple[NodeStore, ...]:
        """The object stores of the nodes that the actors are on, as they lie now."""
        return self._make.seats.stores()

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

    def _started(self, reference: Any, rank: int, what: str) -> Any:
        """Like `call`, for a rank of the learner that starts, as soon as it has room."""
        cluster, seats = self.config.cluster, self._make.seats
        deadline = time.monotonic() + cluster.wait_s
        while True:
            try:
                return wait_for(
                    reference,
                    cluster.start_timeout_s,
                    what,
                    self.book.explain,
                    START_LIMIT,
                    lambda: seats.check(rank),
                )
            except NoRoomError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {cluster.wait_s:g} s (cluster.wait_s) for {what}: {error}") from error
                log.warning("%s; waiting for a node that has, up to %g s (cluster.wait_s)", error, cluster.wait_s)
                while not seats.has_room(rank) and time.monotonic() < deadline:
                    time.sleep(SLICE_S)

    def _start_learner(self) -> None:
        ranks = range(self.config.learner.ranks)
        self.learners = LearnerGroup([self._make.learner(rank) for rank in ranks])
        self._learner_ready = dict(zip(self._make.names, self.learners.warm_up(), strict=False))

"""The learner's Ray actors: thin shells that resolve object references and call the engine.

There is one actor per rank; the driver calls the same method on all of them (see `runtime.cluster.learners`).

Invariants:
- Media are fetched from the object store here, so they never pass through the driver.
- A rank fetches only its own share.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from learner.messages import RankDiedError, TrainBatch
from learner.setup import LearnerSetup, RankPlace
from streams.messages import MESSAGES_VERSION, GroupPayload, ScoreReport, TrainReport, WeightsUpdate
from streams.support.actor_log import open_actor_log
from streams.support.imports import large_imports
from streams.support.usage import DeviceInfo, ProcessUsage

if TYPE_CHECKING:
    from learner.engine import LearnerEngine
    from learner.parallel.ranks import Ranks

DEATHS = (RayActorError, OutOfMemoryError)
"""What Ray says of a rank that died; the second of one that its memory monitor has ended."""
FAILURE_GRACE_S = 3.0
"""Seconds to wait for the other ranks' replies after one has failed, in case a rank died and caused that failure."""


class Learner:
    """Actor class of a rank; made a Ray actor by `runtime.cluster.session` with the placement's resources."""

    def __init__(self, fetch_timeout_s: float) -> None:
        open_actor_log()
        self._engine: LearnerEngine | None = None
        self._timeout = fetch_timeout_s
        self._ranks: Ranks | None = None
        self._store: Any = None

    # In a thread of its own: it is asked for while a step runs.
    concurrency_groups = {"beat": 1}  # noqa: RUF012

    @ray.method(concurrency_group="beat")
    def beat(self) -> None:
        """Give a sign of life."""

    def warm_up(self) -> int:
        """Import the slow modules while the driver makes data; return the pid."""
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("CUDA_VISIBLE_DEVICES") else "cuda")
        with large_imports():
            import deepspeed  # noqa: F401

            import learner.engine  # noqa: F401

        return os.getpid()

    def device(self) -> DeviceInfo:
        """Return the device that this rank will load its model onto."""
        from streams.support.meter import device_info

        return device_info(ray.util.get_node_ip_address())

    def usage(self) -> ProcessUsage:
        """Return the time and memory of the engine's phases. Raises RuntimeError before `setup`."""
        engine = self._ready()
        name = "learner" if engine.ranks.world == 1 else f"learner rank {engine.ranks.place.rank}"
        from streams.scoring.compiled import compile_count

        return ProcessUsage(name, engine.meter.usage(), compile_count())

    def open_rendezvous(self, world: int, timeout_s: float) -> RankPlace:
        """Open the store where the other ranks meet rank 0, and return its address. Called on rank 0 of several.

        The process group outlives a stage, so in later stages this returns the place that was joined first.
        """
        if self._ranks is not None:
            return self._ranks.place
        from learner.parallel.ranks import open_store

        place = RankPlace(0, world, ray.util.get_node_ip_address(), 0, timeout_s)
        self._store = open_store(place)
        return dataclasses.replace(place, port=self._store.port)

    def setup(self, setup: LearnerSetup, place: RankPlace | None = None) -> int:
        """Build the engine of a stage in place of the one before; return the number of trainable parameters.

        place: this rank's place; None if there is only one rank.
        Raises ValueError if the driver's messages are of another version.
        """
        if setup.messages_version != MESSAGES_VERSION:
            raise ValueError(f"learner speaks messages version {MESSAGES_VERSION}, driver {setup.messages_version}")
        from learner.engine import LearnerEngine
        from learner.parallel.ranks import Ranks

        if self._ranks is None:
            self._ranks = Ranks(place or RankPlace(timeout_s=setup.learner.collective_timeout_s), self._store)
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._engine = LearnerEngine(setup, self._ranks)
        return self._engine.trainable_parameters

    def train(self, batch: TrainBatch) -> tuple[TrainReport, WeightsUpdate | None]:
        """Run one optimiser step. Return its report and, if published, the new weights.

        They are two objects: the driver reads only the first, and passes on a reference to the second.
        """
        from learner.batching import TrainItem

        engine = self._ready()
        items = [
            TrainItem(self._resolve(group.payload), tuple(runs.expand() for runs in group.advantages))
            for group in batch.groups
        ]
        report = engine.train(batch.step, batch.loss, items)
        return report, engine.export_weights() if batch.publish else None

    def weights(self) -> WeightsUpdate | None:
        """Return the current weights on rank 0, None on the other ranks."""
        return self._ready().export_weights()

    def score(self, payloads: tuple[Any, ...]) -> ScoreReport:
        """Re-score the sampled tokens of all ranks' groups. payloads: this rank's GroupPayloads, or references."""
        return self._ready().score([self._resolve(payload) for payload in payloads])

    def save(self, path: str, streaming: dict[str, Any], resumable: bool) -> None:
        """Write this rank's part of a checkpoint, see `LearnerEngine.save`."""
        self._ready().save(Path(path), streaming, resumable=resumable)

    def load(self, path: str) -> int:
        """Load a checkpoint and return its version."""
        return self._ready().load(Path(path))

    def _ready(self) -> LearnerEngine:
        if self._engine is None:
            raise RuntimeError("the learner was used before setup()")
        return self._engine

    def _resolve(self, payload: Any) -> GroupPayload:
        group = self._get(payload)
        return dataclasses.replace(group, media=self._get(group.media))

    def _get(self, value: Any) -> Any:
        return ray.get(value, timeout=self._timeout) if isinstance(value, ray.ObjectRef) else value


class LeadLearner(Learner):
    """Rank 0 of several ranks. `join` runs in a thread beside the training calls and replies for the whole group."""

    # `join` waits for as long as a step runs: with threads of its own it does not keep this rank's other calls waiting.
    concurrency_groups = {"beat": 1, "join": 8}  # noqa: RUF012

    @ray.method(concurrency_group="join")
    def join(self, what: str, replies: list[Any]) -> Any:
        """Return rank 0's reply once all ranks have replied.

        Raises RuntimeError as soon as a rank fails, and names it; RankDiedError for one that died, rather than for those that
        lost their connection to it. Raises TimeoutError that names the ranks which did not reply in time.
        """
        failures = self._failures(replies, self._timeout)
        if failures is None:
            missing = [rank for rank, ref in enumerate(replies) if not ray.wait([ref], timeout=0)[0]]
            raise TimeoutError(f"waited {self._timeout:g} s for learner ranks {missing} to finish {what}")
        if failures:
            rank, error = min(failures.items(), key=lambda item: (not isinstance(item[1], DEATHS), item[0]))
            if isinstance(error, DEATHS):
                raise RankDiedError(f"learner rank {rank} of {len(replies)} died during {what}: {error}") from error
            # Ray's own text repeats the remote traceback; the cause alone is what a reader needs.
            cause = getattr(error, "cause", None) or error
            raise RuntimeError(f"learner rank {rank} of {len(replies)} failed during {what}: {cause}") from error
        return ray.get(replies[0], timeout=self._timeout)

    def _failures(self, replies: list[Any], timeout_s: float) -> dict[int, Exception] | None:
        """Return errors by rank; empty if every rank succeeded, None if some rank did not reply in time."""
        failures: dict[int, Exception] = {}
        pending, limit = list(replies), timeout_s
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=limit)
            if not done:
                return failures or None
            try:
                ray.get(done[0], timeout=timeout_s)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the group's failure
                failures[replies.index(done[0])] = error
                limit = FAILURE_GRACE_S
        return failures

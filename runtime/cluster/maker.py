"""Makes the actors of a session in the seats that are reserved for them: at the start, and again in place of one that died.

Invariants:
* an actor that is made again has the short name, the seat and the log of the one before;
* an actor whose seat has no room yet waits, and starts when it has;
* an actor without a GPU in its bundle sees none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray

from conf.schema import RunConfig
from learner.worker import LeadLearner, Learner
from rewards.scorer import Scorer
from rollout.worker import RolloutWorker
from runtime.cluster.actors import ActorBook, named_class, short_name
from runtime.placing.preflight import Bundle
from runtime.placing.seats import Seats


class ActorMaker:
    """seats: in the order of `runtime.placing.placement.plan_bundles`."""

    def __init__(self, config: RunConfig, book: ActorBook, seats: Seats) -> None:
        self._config, self._book, self.seats = config, book, seats
        self._made: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """What the actors are called, the learner's ranks first."""
        return [bundle.name for bundle in self.seats.bundles]

    def seat_of_worker(self, worker: int) -> int:
        """Return the index of a rollout worker's seat."""
        return self._config.learner.ranks + worker

    def learner(self, rank: int) -> Any:
        config = self._config
        threads = max(config.learner.threads, int(config.sft.learner.get("threads", 1)))
        lead = Learner if config.learner.ranks == 1 else LeadLearner
        return self._make(lead if rank == 0 else Learner, rank, threads, config.cluster.call_timeout_s)

    def worker(self, worker: int) -> Any:
        config = self._config
        threads = config.rollout.threads
        return self._make(RolloutWorker, self.seat_of_worker(worker), threads, worker, threads, config.data.cache_mb)

    def seat_of_scorer(self, scorer: int) -> int:
        """Return the index of a scorer's seat."""
        return len(self.seats.bundles) - self._config.reward.workers + scorer

    def scorer(self, scorer: int) -> Any:
        return self._make(Scorer, self.seat_of_scorer(scorer), 1, self._config.reward)

    def _make(self, actor: type, index: int, threads: int, *args: Any) -> Any:
        bundle = self.seats.bundles[index]
        name = short_name(bundle.name)
        # The learner's ranks answer some calls beside their work.
        groups = getattr(actor, "concurrency_groups", None)
        make: Any = ray.remote
        named = named_class(actor, name)
        remote = make(concurrency_groups=groups)(named) if groups else make(named)
        environment = {"OMP_NUM_THREADS": str(threads)} | _hidden_gpus(bundle) | self._book.environment(name)
        options = remote.options(
            # Ray may still know the one that died by its name.
            name=self._book.ray_name(name, self._made[name]),
            num_cpus=bundle.cpus,
            num_gpus=bundle.gpus,
            scheduling_strategy=self.seats.strategy(index),
            runtime_env={"env_vars": environment},
        )
        handle = options.remote(*args)
        self._made[name] += 1
        self._book.add(name, handle)
        return handle


def _hidden_gpus(bundle: Bundle) -> dict[str, str]:
    """Return the variables that hide GPUs from an actor that has none reserved: it must not take another's memory."""
    return {} if bundle.gpus else {"CUDA_VISIBLE_DEVICES": ""}

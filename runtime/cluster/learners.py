"""The learner's ranks as the driver sees them: one call, one reference to wait on.

Invariants:
* every call goes to every rank, in the same order, so that their collectives meet;
* a step's groups are shared out by tokens, always in the same way;
* the reference that a call returns is ready with rank 0's reply when all ranks have replied;
* it fails as soon as any rank fails, with an error that names the rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from learner.messages import TrainBatch
from learner.parallel.assign import share_out
from learner.setup import LearnerSetup, RankPlace
from runtime.cluster.events import START_LIMIT, lost_with_an_actor, wait_for


class LearnerGroup:
    """The actors of all ranks. With a single rank its own reply is returned, without the extra call to `join`."""

    def __init__(self, actors: list[Any]) -> None:
        """`actors[0]` is rank 0: a LeadLearner if there are several."""
        self.actors = actors
        self._saves = 0

    @property
    def ranks(self) -> int:
        return len(self.actors)

    def warm_up(self) -> list[Any]:
        """Have the ranks import slow modules. Returns references to their pids."""
        return [actor.warm_up.remote() for actor in self.actors]

    def setup(self, setup: LearnerSetup, timeout_s: float) -> int:
        """Build all ranks' engines and wait for them; returns the number of trainable parameters."""
        what = f"to load {setup.checkpoint}"
        if self.ranks == 1:
            return wait_for(self.actors[0].setup.remote(setup), timeout_s, f"the learner {what}", limit=START_LIMIT)
        collective_s = setup.learner.collective_timeout_s
        rendezvous = self.actors[0].open_rendezvous.remote(self.ranks, collective_s)
        what_first = "learner rank 0 to name its address"
        place: RankPlace = wait_for(rendezvous, timeout_s, what_first, limit=START_LIMIT)
        places = [dataclasses.replace(place, rank=rank) for rank in range(self.ranks)]
        replies = [a.setup.remote(setup, place) for a, place in zip(self.actors, places, strict=True)]
        joined = self._joined(replies, what)
        return wait_for(joined, timeout_s, f"{self.ranks} learner ranks {what}", limit=START_LIMIT)

    def train(self, batch: TrainBatch) -> tuple[Any, Any]:
        """Run one optimiser step. Returns references to the report and to the new weights (None if unpublished)."""
        shares = share_out([group.tokens for group in batch.groups], self.ranks)
        replies = []
        for actor, share in zip(self.actors, shares, strict=True):
            part = dataclasses.replace(batch, groups=tuple(batch.groups[i] for i in share))
            replies.append(actor.train.options(num_returns=2).remote(part))
        return self._joined([report for report, _ in replies], f"optimiser step {batch.step + 1}"), replies[0][1]

    def check_unfetched(self, error: Exception) -> None:
        """Raise the error of a step unless it only says that media were gone before the learner had fetched them.

        One rank fetches before it computes: the step was not made. Several may have begun to wait for one another.
        """
        if self.ranks > 1 or not lost_with_an_actor(error):
            raise error

    def weights(self) -> Any:
        """Return a reference to the current weights."""
        return self._joined([actor.weights.remote() for actor in self.actors], "publishing the weights")

    def score(self, payloads: tuple[Any, ...], tokens: tuple[int, ...] = ()) -> Any:
        """Score groups under the current weights. tokens: of each group, by which they are shared out evenly."""
        shares = share_out(list(tokens) if tokens else [1] * len(payloads), self.ranks)
        replies = [
            actor.score.remote(tuple(payloads[i] for i in share))
            for actor, share in zip(self.actors, shares, strict=True)
        ]
        return self._joined(replies, f"scoring {len(payloads)} groups")

    def save(self, path: str, streaming: dict[str, Any], *, resumable: bool = True, limit_s: float) -> Any:
        """Write a checkpoint of the weights as they are between the calls before and after this one.

        The ranks copy it, and go on with their next call while they write. The reference is ready when every rank has written
        its part below `path`, or fails, after `limit_s` at the latest.
        """
        number = self._saves = self._saves + 1
        for actor in self.actors:
            actor.save.remote(number, path, streaming, resumable)
        return self._joined([actor.written.remote(number, limit_s) for actor in self.actors], f"saving {path}", limit_s)

    def load(self, path: str) -> Any:
        """Restore everything that `save` wrote; the reply is the version."""
        return self._joined([actor.load.remote(path) for actor in self.actors], f"loading {path}")

    def _joined(self, replies: list[Any], what: str, limit_s: float | None = None) -> Any:
        return replies[0] if self.ranks == 1 else self.actors[0].join.remote(what, replies, limit_s)

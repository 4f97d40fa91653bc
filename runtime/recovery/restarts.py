"""A learner that dies: the stage makes another attempt in this run, with new processes, from its newest checkpoint.

It is what the same command would do with resume=auto, without a person to type it. Rollout workers start anew, too: whatever
they had of the weights that are undone is gone with their processes, so that no two versions ever share a name. Groups that
were not trained by the checkpoint's weights are rolled out again, under their names and seeds.

Invariants:
* a stage makes at most `cluster.learner_restarts` further attempts after failures in a run, and none after a second failure
  that came no further than the first;
* losses that come from outside (a node that is drained or lost, SIGTERM) have a number of their own, `cluster.preemptions`;
* a checkpoint that is being written when the learner dies is completed, if the learner's part is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from conf.platform import ClusterConfig
from learner.messages import RankDiedError
from runtime.cluster.actors import OUTSIDE
from runtime.cluster.events import death_of, lost_with_an_actor
from runtime.cluster.session import Session
from runtime.recovery.suspects import Suspects
from runtime.store.checkpoint import CheckpointState

LEARNER = "learner"
ANSWER_S = 5.0
"""How long a learner is given to say that it lives, once something that only it can have had is lost."""


@dataclass(frozen=True)
class LearnerLoss:
    """words: which process died, where, of what. outside: of nothing that it did."""

    words: str
    outside: bool


def learner_loss(error: BaseException, session: Session) -> LearnerLoss | None:
    """Return the loss of the learner that an attempt ended with; None if it ended with something else."""
    for cause in _chain(error):
        # Ray's own copy of it, which comes first, quotes the other process's traceback.
        if isinstance(cause, RankDiedError) and not isinstance(cause, RayTaskError):
            return LearnerLoss(str(cause), bool(OUTSIDE.search(str(cause))))
        if isinstance(cause, RayActorError) and session.book.name_of(cause).startswith(LEARNER):
            return _loss(cause, session)
    if any(isinstance(cause, Exception) and lost_with_an_actor(cause) for cause in _chain(error)):
        # Weights that nobody can fetch any more may be missed before their learner is.
        for actor in session.learners.actors:
            reply = actor.warm_up.remote()
            try:
                ray.get(reply, timeout=ANSWER_S)
            except GetTimeoutError:
                continue
            except RayError as error_of_reply:
                if (dead := death_of(error_of_reply, reply)) is not None:
                    return _loss(dead, session)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, those that came from another process included."""
    while error is not None:
        yield error
        remote = getattr(error, "cause", None)
        error = remote if isinstance(remote, BaseException) else error.__cause__


def _loss(error: RayActorError, session: Session) -> LearnerLoss:
    # Nobody answers where it was, before anybody knows that its node is gone.
    outside = isinstance(error, ActorUnavailableError) or error.preempted or bool(OUTSIDE.search(str(error)))
    return LearnerLoss(session.book.explain(error), outside)


@dataclass(frozen=True)
class _Failure:
    stage: str
    step: int
    words: str


class Restarts:
    """The further attempts that the stages of one run have made.

    Attributes:
        saves: references to checkpoints that are being written.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._failures: list[_Failure] = []
        self._outside = 0
        self._deaths: dict[str, Counter[str]] = {}
        self._suspects: dict[str, Suspects] = {}
        self.saves: set[Any] = set()

    def deaths(self, stage: str, resumed: CheckpointState | None) -> Counter[str]:
        """Return the deaths in a stage by the actor's name, to be counted on.

        resumed: what this run found when it began with the stage, or with its latest attempt.
        """
        before = resumed.counters.get("deaths", {}) if resumed else {}
        return self._deaths.setdefault(stage, Counter(before))

    def suspects(self, stage: str) -> Suspects:
        """Return what attempts of a stage have found out about work that ends its workers; nothing of it is under way."""
        found = self._suspects.setdefault(stage, Suspects())
        found.begin()
        return found

    def allow(self, stage: str, step: int, loss: LearnerLoss, error: Exception) -> str:
        """Note a loss at `step`; returns which restart this is, in words. Raises `error`, or RuntimeError, for none more."""
        config = self._config
        if loss.outside:
            self._outside += 1
            if self._outside > config.preemptions:
                self._end(f"{self._outside} times from outside, cluster.preemptions={config.preemptions}", loss, error)
            return f"loss {self._outside} of {config.preemptions} from outside"
        self._failures.append(_Failure(stage, step, loss.words))
        count = len(self._failures)
        if count > config.learner_restarts:
            self._end(f"{count} times, cluster.learner_restarts={config.learner_restarts}", loss, error)
        if count > 1:
            before = self._failures[-2]
            if before.stage == stage and before.step >= step:
                self._end(f"twice at {stage} step {step} without getting further", loss, error)
        return f"restart {count} of {config.learner_restarts}"

    def _end(self, how: str, loss: LearnerLoss, error: Exception) -> NoReturn:
        if len(self._failures) < 2:
            raise error if isinstance(error, RuntimeError) else RuntimeError(loss.words) from error
        first = self._failures[0]
        raise RuntimeError(
            f"the learner died {how}. The first time, at {first.stage} step {first.step}: {first.words}\n"
            f"The last time: {loss.words}"
        ) from error

    def settle_saves(self, timeout_s: float) -> None:
        """Wait until the checkpoints that were being written are there or have failed; give up those that take longer."""
        if self.saves:
            _, late = ray.wait(list(self.saves), num_returns=len(self.saves), timeout=timeout_s)
            for reference in late:
                ray.cancel(reference, force=True)
        self.saves.clear()


def words_of(loss: LearnerLoss) -> str:
    """Return who died of what, in one line."""
    return loss.words.partition("\n")[0]

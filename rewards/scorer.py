"""The scorer: the class that becomes a Ray actor around the composed reward.

Invariant: a failed reward call affects that stream alone (see `rewards.compose`), never the run.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from rewards.compose import Reward, RewardConfig, RewardResult
from rewards.outcome import StreamOutcome
from rewards.scripted import oracle_turns
from streams.messages import RewardJob, ScriptedJob
from streams.support.actor_log import open_actor_log


class Scorer:
    """Actor class; made a Ray actor by `runtime.cluster.session`."""

    def __init__(self, config: RewardConfig) -> None:
        open_actor_log()
        try:
            self._reward = Reward.from_config(config)
        except ValueError as error:
            # The driver has checked the same config: what differs is the machine, or what Python finds on it.
            raise ValueError(
                f"{error} (in the scorer, process {os.getpid()} on {socket.gethostname()}: a term's module must be "
                "importable there, too; put it beside launch.py (or where `sightline` is typed), on PYTHONPATH, or install "
                "it on every node)"
            ) from error

    def pid(self) -> int:
        return os.getpid()

    def score(self, jobs: tuple[RewardJob, ...]) -> tuple[tuple[RewardResult, ...], ...]:
        """Return, per job, one result per stream."""
        return tuple(
            tuple(self._reward(StreamOutcome(job.task, turns, job.plan.chunk_seconds)) for turns in job.turns)
            for job in jobs
        )

    def oracle(
        self, jobs: tuple[ScriptedJob, ...], think_tokens: int, seconds: float
    ) -> tuple[tuple[RewardResult, ...], int]:
        """Play the scripted oracle over the jobs. Returns one result per job, and the length of its think spans.

        The oracle thinks nothing, or `think_tokens` tokens a turn if that earns more over all jobs: a reward may pay for
        either. Jobs are played in order until `seconds` are over; there are then fewer results.
        """
        best = play(self._reward, jobs, 0, time.monotonic() + seconds / 2)
        if all(result.total == 1 for result in best):
            return best, 0
        thinking = play(self._reward, jobs[: len(best)], think_tokens, time.monotonic() + seconds / 2)
        if _total(thinking) <= _total(best[: len(thinking)]):
            return best, 0
        return thinking, think_tokens


def play(reward: Reward, jobs: Sequence[ScriptedJob], think_tokens: int, over: float) -> tuple[RewardResult, ...]:
    """Return the oracle's result per job; fewer, but at least one, once the clock (time.monotonic) is past `over`."""
    played: list[RewardResult] = []
    for job in jobs:
        if played and time.monotonic() > over:
            break
        turns = oracle_turns(job.task, job.plan, job.fits, think_tokens)
        played.append(reward(StreamOutcome(job.task, turns, job.plan.chunk_seconds)))
    return tuple(played)


def _total(results: Sequence[RewardResult]) -> float:
    return sum(result.total for result in results)

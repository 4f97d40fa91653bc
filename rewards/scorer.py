"""The scorer's Ray actor: a thin shell around the composed reward.

Owner: rewards. One reward call's failure costs that stream (see `rewards.compose`), never the run.
"""

from __future__ import annotations

import os
import socket

from rewards.compose import Reward, RewardConfig, RewardResult
from rewards.outcome import StreamOutcome
from streams.actorlog import open_actor_log
from streams.messages import RewardJob


class Scorer:
    """Actor class; made a Ray actor by `rl.cluster`."""

    def __init__(self, config: RewardConfig) -> None:
        open_actor_log()
        try:
            self._reward = Reward.from_config(config)
        except ValueError as error:
            # The driver has checked the same config: what differs is the machine, or what Python finds on it.
            raise ValueError(
                f"{error} (in the scorer, process {os.getpid()} on {socket.gethostname()}: a term's module must be "
                "importable there, too; put it beside launch.py, on PYTHONPATH, or install it on every node)"
            ) from error

    def pid(self) -> int:
        return os.getpid()

    def score(self, jobs: tuple[RewardJob, ...]) -> tuple[tuple[RewardResult, ...], ...]:
        """Per job, one result per stream."""
        return tuple(
            tuple(self._reward(StreamOutcome(job.task, turns, job.chunk_seconds)) for turns in job.turns)
            for job in jobs
        )

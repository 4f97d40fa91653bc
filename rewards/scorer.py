"""The scorer: the class that becomes a Ray actor around the composed reward.

Invariants:
* a failed reward call affects that stream alone (see `rewards.compose`), never the run;
* a reward that cannot be interrupted ends this process, not the run (see `runtime.scoring`).
"""

from __future__ import annotations

import os
import socket

from rewards.compose import Reward, RewardConfig, RewardResult
from rewards.deadline import WATCHDOG
from rewards.outcome import StreamOutcome
from streams.messages import RewardJob
from streams.support.actor_log import ACTOR_VARIABLE, crash_file, open_actor_log


class Scorer:
    """Actor class; made a Ray actor by `runtime.cluster.maker`."""

    def __init__(self, config: RewardConfig) -> None:
        open_actor_log()
        if ACTOR_VARIABLE in os.environ:
            WATCHDOG.start(crash_file)
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
        try:
            return tuple(
                tuple(self._reward(StreamOutcome(job.task, turns, job.plan.chunk_seconds)) for turns in job.turns)
                for job in jobs
            )
        finally:
            WATCHDOG.rest()

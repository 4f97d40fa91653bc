"""Versions of the weights: which one every worker runs, and which it fetches next. Pure bookkeeping.

Invariants:
* a worker fetches one version at a time, always the newest;
* at most two published versions are alive, the newest and one older that is still being fetched: a step waits with
  publishing while a fetch of an older version is under way;
* a worker more than `max_lag` versions behind gets no task.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VersionLedger:
    """Versions by worker. `published` is the newest version."""

    workers: int
    max_lag: int
    published: int = 0
    running: dict[int, int] = field(default_factory=dict)
    fetching: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.running = dict.fromkeys(range(self.workers), self.published)

    def publish(self, version: int) -> None:
        assert version > self.published, "versions only grow"
        assert self.may_publish(), "a third version would be alive"
        self.published = version

    def may_publish(self) -> bool:
        """False while some worker still fetches a version that is older than the newest."""
        return all(version == self.published for version in self.fetching.values())

    def next_fetches(self) -> list[int]:
        """Workers that should now fetch the newest version."""
        due = [w for w in self.running if w not in self.fetching and self.running[w] < self.published]
        for worker in due:
            self.fetching[worker] = self.published
        return due

    def swapped(self, worker: int, version: int) -> None:
        del self.fetching[worker]
        self.running[worker] = version

    def may_work(self, worker: int, learner_version: int) -> bool:
        return learner_version - self.running[worker] <= self.max_lag

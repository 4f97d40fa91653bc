"""Versions of the weights: which one every worker runs, and which it fetches next. Pure: it counts versions only.

Invariants:
* a worker fetches one version at a time, always the newest;
* at most two published versions are alive: the newest, and an older one that is still being fetched;
* no optimiser step starts while an older version is being fetched, as it would publish a third;
* a worker more than `max_lag` versions behind gets no task, nor one that is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VersionLedger:
    """Versions by worker.

    Attributes:
        workers: Number of workers.
        max_lag: How many versions a worker may be behind and still get tasks.
        published: The newest version.
        running: The version that each worker runs; no entry while it is lost.
        fetching: The version that a worker fetches; no entry if it fetches none.
    """

    workers: int
    max_lag: int
    published: int = 0
    running: dict[int, int] = field(default_factory=dict)
    fetching: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.running = dict.fromkeys(range(self.workers), self.published)

    def publish(self, version: int) -> None:
        """Note a new version, which workers can fetch from now on."""
        assert version > self.published, "versions only grow"
        assert self.may_publish(), "a third version would be alive"
        self.published = version

    def may_publish(self) -> bool:
        """Return whether a version may be published: no worker is fetching one older than the newest."""
        return all(version == self.published for version in self.fetching.values())

    def next_fetches(self) -> list[int]:
        """Return the workers that have to fetch the newest version now, and note that they do."""
        due = [w for w in sorted(self.running) if w not in self.fetching and self.running[w] < self.published]
        for worker in due:
            self.fetching[worker] = self.published
        return due

    def swapped(self, worker: int, version: int) -> None:
        """Note that a worker runs the version that it fetched."""
        del self.fetching[worker]
        self.running[worker] = version

    def lose(self, worker: int) -> None:
        """Note that a worker died, with whatever it fetched; also if it was lost already."""
        self.running.pop(worker, None)
        self.fetching.pop(worker, None)

    def restore(self, worker: int, version: int) -> None:
        """Note that a worker is there again, and runs this version."""
        assert worker not in self.running, "it was not lost"
        self.running[worker] = version

    def runs(self, worker: int, version: int) -> bool:
        """Return whether a worker runs this version or a newer one."""
        return worker in self.running and self.running[worker] >= version

    def may_work(self, worker: int, learner_version: int) -> bool:
        """Return whether a worker is there, and at most `max_lag` versions behind the learner."""
        return self.runs(worker, learner_version - self.max_lag)

    @property
    def settled(self) -> bool:
        """Whether every worker that is there runs the newest version."""
        return all(version == self.published for version in self.running.values())

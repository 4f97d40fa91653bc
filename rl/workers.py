"""The rollout workers and the scorers, shared by training and the evaluation beside it: streams out, weights in.

Invariants:
* every reply of a worker passes the mismatch gate before it is used;
* a worker fetches a published version at once, or, if it is fetching another, the newest one after that
  (`rl.versions`);
* every stream gets a reward, or the cause why it has none, whatever becomes of the scorers (`runtime.scoring`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rl.versions import VersionLedger
from runtime.cluster.events import Events
from runtime.cluster.session import Session
from runtime.mismatch_gate import MismatchGate
from runtime.recovery.revival import Revival
from runtime.scoring.desk import Results
from runtime.scoring.scorers import Scoring
from streams.messages import GroupSummary, RewardJob, RolloutTask, SwapReport

CHECK_TRIES = 10
"""Tasks that each worker may try until it has one to compare with."""


class Workers:
    """Calls the workers and the scorers for one stage; their replies are events."""

    def __init__(
        self, session: Session, events: Events, ledger: VersionLedger, gate: MismatchGate, revival: Revival
    ) -> None:
        self._session, self._events, self._gate, self._revival = session, events, gate, revival
        self._scoring = Scoring(session.crew.scorers, events.expect)
        self.ledger = ledger
        self.suspects = revival.suspects
        self._weights: Any = None
        self._swaps: list[SwapReport] = []

    def roll_out(
        self,
        worker: int,
        request: RolloutTask,
        what: str,
        handle: Callable[[GroupSummary, Any], None],
        lost: Callable[[], None] | None = None,
    ) -> None:
        """Send a group to a worker. Calls `handle` with its summary and a reference to its payload, or `lost` if it died."""
        suspects = self.suspects
        suspects.sent(worker, request.group)
        summary, payload = self._session.crew.places.workers[worker].rollout.options(num_returns=2).remote(request)

        def arrived(value: GroupSummary) -> None:
            self._revival.alive(f"rollout-{worker}")
            suspects.over(worker, request.group)
            self._gate.observe(f"rollout worker {worker}", value.monitor, value.off)
            handle(value, payload)

        self._events.expect(summary, f"{what} on rollout worker {worker}", arrived, lost=lost)

    def score(self, jobs: tuple[RewardJob, ...], what: str, handle: Callable[[Results], None]) -> None:
        """Have the rewards of `jobs` computed. Calls `handle` with, for each job, one result per stream."""
        self._scoring.score(jobs, what, handle)

    def publish(self, version: int, weights: Any) -> None:
        """Have the workers fetch new weights. weights: object reference to a WeightsUpdate."""
        self.ledger.publish(version)
        self._weights = weights
        self._start_fetches()

    def catch_up(self) -> None:
        """Have workers that are behind, as those that were lost, fetch the newest weights."""
        self._start_fetches()

    def take_swaps(self) -> list[SwapReport]:
        """Return the swaps since the last call."""
        swaps, self._swaps = self._swaps, []
        return swaps

    def _start_fetches(self) -> None:
        for worker in self.ledger.next_fetches():
            actor = self._session.crew.places.workers[worker]
            self._events.expect(
                # In a list, so that Ray passes the reference itself, and the worker fetches the weights in the
                # background.
                actor.update_weights.remote([self._weights]),
                f"rollout worker {worker} to swap to version {self.ledger.published}",
                partial(self._swapped, actor),
            )

    def _swapped(self, actor: Any, report: SwapReport) -> None:
        if self._session.crew.places.workers[report.worker] is not actor:
            return  # it died meanwhile, and another one has its place
        self.ledger.swapped(report.worker, report.version)
        self._swaps.append(report)
        self._start_fetches()


class PublishedGroups:
    """One group of every worker on the weights that it swapped in last, for the learner that published them to score.

    A swap that copied nothing, or named the wrong version, fails there. A task that fails, or a worker that dies, costs a try
    of CHECK_TRIES.
    """

    def __init__(
        self, workers: Workers, version: int, extra: Callable[[str], RolloutTask], expected: Callable[[], set[int]]
    ) -> None:
        """version: the newest. extra: makes a request for one more group, under this name.

        expected: returns the workers that are there, or will be: others are not waited for.
        """
        self._workers, self._version, self._extra, self._expected = workers, version, extra, expected
        self._left = [CHECK_TRIES] * workers.ledger.workers
        self._asked: set[int] = set()
        self._found: dict[int, Any] = {}

    def payloads(self, wait: Callable[[], None]) -> tuple[Any, ...]:
        """Return a group's payload of each worker that could roll one out. wait: `Events.wait`."""
        while unfinished := [w for w in range(len(self._left)) if w not in self._found and self._open(w)]:
            for worker in unfinished:
                if worker not in self._asked and self._workers.ledger.runs(worker, self._version):
                    self._ask(worker)
            wait()
        return tuple(self._found[worker] for worker in sorted(self._found))

    def _open(self, worker: int) -> bool:
        return worker in self._asked or (self._left[worker] > 0 and worker in self._expected())

    def _ask(self, worker: int) -> None:
        self._left[worker] -= 1
        self._asked.add(worker)

        def arrived(summary: GroupSummary, payload: Any) -> None:
            self._asked.discard(worker)
            if summary.failed is None:
                self._found[worker] = payload

        self._workers.roll_out(
            worker,
            self._extra(f"published-{worker}"),
            "a group on the published weights",
            arrived,
            lambda: self._asked.discard(worker),
        )

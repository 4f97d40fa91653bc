"""The rollout workers and the scorer, shared by training and the evaluation beside it: streams out, weights in.

Invariants:
* every reply of a worker passes the mismatch gate before it is used;
* a worker fetches a published version at once, or, if it is fetching another, the newest one after that
  (`rl.versions`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewards.compose import RewardResult
from rl.versions import VersionLedger
from runtime.cluster.events import Events
from runtime.cluster.session import Session
from runtime.mismatch_gate import MismatchGate
from streams.messages import GroupSummary, RewardJob, RolloutTask, SwapReport


class Workers:
    """Calls the workers and the scorer for one stage; their replies are events."""

    def __init__(self, session: Session, events: Events, ledger: VersionLedger, gate: MismatchGate) -> None:
        self._session, self._events, self._gate = session, events, gate
        self.ledger = ledger
        self._weights: Any = None
        self._swaps: list[SwapReport] = []

    def roll_out(
        self, worker: int, request: RolloutTask, what: str, handle: Callable[[GroupSummary, Any], None]
    ) -> None:
        """Send a group to a worker. Calls `handle` with its summary and a reference to its payload."""
        summary, payload = self._session.workers[worker].rollout.options(num_returns=2).remote(request)

        def arrived(value: GroupSummary) -> None:
            self._gate.observe(f"rollout worker {worker}", value.monitor, value.off)
            handle(value, payload)

        self._events.expect(summary, f"{what} on rollout worker {worker}", arrived)

    def score(
        self, jobs: tuple[RewardJob, ...], what: str, handle: Callable[[list[tuple[RewardResult, ...]]], None]
    ) -> None:
        """Have the rewards of `jobs` computed. Calls `handle` with, for each job, one result per stream."""
        self._events.expect(self._session.scorer.score.remote(jobs), f"the scores of {what}", handle)

    def publish(self, version: int, weights: Any) -> None:
        """Have the workers fetch new weights. weights: object reference to a WeightsUpdate."""
        self.ledger.publish(version)
        self._weights = weights
        self._start_fetches()

    def take_swaps(self) -> list[SwapReport]:
        """Return the swaps since the last call."""
        swaps, self._swaps = self._swaps, []
        return swaps

    def _start_fetches(self) -> None:
        for worker in self.ledger.next_fetches():
            self._events.expect(
                # In a list, so that Ray passes the reference itself, and the worker fetches the weights in the
                # background.
                self._session.workers[worker].update_weights.remote([self._weights]),
                f"rollout worker {worker} to swap to version {self.ledger.published}",
                self._swapped,
            )

    def _swapped(self, report: SwapReport) -> None:
        self.ledger.swapped(report.worker, report.version)
        self._swaps.append(report)
        self._start_fetches()

"""What the ranks agree on before and after an optimiser step, or a scoring call: shares, the step, outcomes, metrics.

Invariants:
- A rank that cannot do its share says so in it; all ranks then refuse together, none is left waiting.
- Every rank comes to the same step and the same metrics, whatever the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from learner.batching import MicroBatchWork, RankWork, common_work
from learner.losses.base import Loss, LossValue, TargetCounts
from learner.parallel.ranks import Ranks
from streams.log.mismatch import LogpDiff, OffToken, most_telling


@dataclass(frozen=True)
class Share:
    """What one rank tells the others before a step: its work, or why it cannot do it."""

    problem: str | None
    work: tuple[MicroBatchWork, ...]
    temperatures: frozenset[float]
    media_kinds: frozenset[str]
    counts: TargetCounts = field(default_factory=TargetCounts)

    @classmethod
    def of(cls, work: RankWork, problem: str | None = None, counts: TargetCounts | None = None) -> Share:
        temperatures, kinds = frozenset(work.temperatures), frozenset(work.media_kinds)
        return cls(problem, work.micro_batches, temperatures, kinds, counts or TargetCounts())


@dataclass(frozen=True)
class Agreed:
    """What all ranks together are about to run.

    Attributes:
        work: One entry per micro-batch of every rank.
        temperature: Score temperature of all logs; 1 if there is none.
        counts: Targets of all ranks.
    """

    work: list[MicroBatchWork]
    temperature: float
    counts: TargetCounts


def agree(ranks: Ranks, mine: Share, what: str, waiting: str) -> Agreed:
    """Exchange shares; on every rank alike, return what they come to or raise ValueError with the first problem.

    what: names the call in the errors. waiting: what a rank that waits in vain waited for.
    """
    shares = ranks.gather(mine, waiting)
    for rank, share in enumerate(shares):
        if share.problem is not None:
            raise ValueError(share.problem if len(shares) == 1 else f"learner rank {rank}: {share.problem}")
    temperatures = {t for share in shares for t in share.temperatures}
    if len(temperatures) > 1:
        raise ValueError(f"{what}: logs of several score temperatures in one batch: {sorted(temperatures)}")
    kinds = {kind for share in shares for kind in share.media_kinds}
    if len(shares) > 1 and len(kinds) > 1:
        raise ValueError(
            f"{what}: media of several kinds ({', '.join(sorted(kinds))}): ranks must call the tower alike"
        )
    return Agreed(
        work=common_work([share.work for share in shares]),
        temperature=next(iter(temperatures), 1.0),
        counts=sum((share.counts for share in shares), TargetCounts()),
    )


@dataclass(frozen=True)
class Step:
    """The whole step as every rank knows it; its loss holds the totals over all ranks."""

    index: int
    loss: Loss[Any]
    work: list[MicroBatchWork]
    temperature: float
    targets: int


@dataclass
class Outcome:
    """What one rank found in a step.

    Attributes:
        sums: Metrics, each micro-batch's divided by the step's targets; `loss` as it is.
        age0: Mismatch on targets that were sampled at the learner's own version.
        outlier: The token of those to look at.
        worst: (distance, stream) of the most extreme difference; infinite if one is not finite.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    age0: LogpDiff = field(default_factory=LogpDiff)
    outlier: OffToken | None = None
    worst: tuple[float, str] = (-1.0, "none")

    def add(self, found: LossValue, entropy: float, targets: int) -> None:
        """Count one micro-batch in. entropy: sum over its targets; targets: of the whole step."""
        self.sums["loss"] += float(found.value.detach())
        for name, total in found.sums.items():
            self.sums[name] += float(total) / targets
        self.sums["entropy"] += entropy / targets


@dataclass(frozen=True)
class Outcomes:
    """What all ranks found in a step."""

    ranks: list[Outcome]

    @property
    def loss(self) -> float:
        return sum(outcome.sums["loss"] for outcome in self.ranks)

    @property
    def worst(self) -> tuple[float, str]:
        return max(outcome.worst for outcome in self.ranks)

    @property
    def age0(self) -> LogpDiff:
        return LogpDiff.merge([outcome.age0 for outcome in self.ranks])

    @property
    def outlier(self) -> OffToken | None:
        return most_telling([outcome.outlier for outcome in self.ranks])

    def metrics(self) -> dict[str, float]:
        """Sums over ranks, and the largest where a largest is meant."""
        age0 = self.age0
        totals = {name: sum(o.sums[name] for o in self.ranks) for name in sorted(self.ranks[0].sums)}
        totals["age0_tokens"] = float(age0.tokens)
        measured = {"age0_logp_diff_mean": age0.mean, "age0_logp_diff_max": age0.max, "age0_logp_diff_k3": age0.k3}
        totals |= {name: value for name, value in measured.items() if value is not None}
        if "ratio_square" in totals:
            square = totals.pop("ratio_square")
            totals["effective_sample_share"] = totals["ratio"] ** 2 / square if square else 0.0
        return totals

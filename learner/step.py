"""What the ranks exchange before and after an optimiser step or a scoring call: shares, the step, outcomes, metrics.

Invariants:
- A rank that cannot do its share reports that in it: all ranks then raise together, and none is left waiting.
- Every rank arrives at the same step and the same metrics, whatever the number of ranks.
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
    """What one rank tells the others before a step.

    Attributes:
        problem: Why it cannot do its share; None if it can.
        work: One entry per micro-batch.
        temperatures: Score temperatures of its logs.
        media_kinds: Kinds of its media.
        counts: Its targets.
    """

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
    """The work that all ranks are about to run together.

    Attributes:
        work: One entry per micro-batch of every rank.
        temperature: Score temperature of all logs; 1 if there are none.
        counts: Targets of all ranks.
    """

    work: list[MicroBatchWork]
    temperature: float
    counts: TargetCounts


def agree(ranks: Ranks, mine: Share, what: str, waiting: str) -> Agreed:
    """Exchange shares and return what they add up to, the same on every rank.

    what: names the call in errors. waiting: what a rank waits for here, for the error if the others do not come.
    Raises ValueError on every rank: with the first problem that a rank reported, or for shares that do not fit
    together.
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
    """The whole step, the same on every rank; its loss was made from the totals over all ranks."""

    index: int
    loss: Loss[Any]
    work: list[MicroBatchWork]
    temperature: float
    targets: int


@dataclass
class Outcome:
    """What one rank found in a step.

    Attributes:
        sums: Metrics: sums over this rank's targets, divided by the step's targets. `loss` comes normalised.
        age0: Mismatch on streams sampled wholly at the learner's own version.
        outlier: Their token with the most telling mismatch.
        worst: (absolute value, stream id) of the largest difference of all targets; infinite if one is not finite.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    age0: LogpDiff = field(default_factory=LogpDiff)
    outlier: OffToken | None = None
    worst: tuple[float, str] = (-1.0, "none")

    def add(self, found: LossValue, entropy: float, targets: int) -> None:
        """Add the sums of one micro-batch. entropy: sum over its targets. targets: their number in the whole step."""
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
        """Return the metrics of the step: sums over the ranks, and figures computed from them."""
        age0 = self.age0
        totals = {name: sum(o.sums[name] for o in self.ranks) for name in sorted(self.ranks[0].sums)}
        totals["age0_tokens"] = float(age0.tokens)
        measured = {"age0_logp_diff_mean": age0.mean, "age0_logp_diff_max": age0.max, "age0_logp_diff_k3": age0.k3}
        totals |= {name: value for name, value in measured.items() if value is not None}
        # ratio and ratio_square are means over the targets, so this is Kish's effective sample size over their number.
        if "ratio_square" in totals:
            square = totals.pop("ratio_square")
            totals["effective_sample_share"] = totals["ratio"] ** 2 / square if square else 0.0
        return totals

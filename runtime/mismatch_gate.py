"""The mismatch gate: stops a run whose learner does not compute the log-probs that its tokens were sampled with.

Pure. It sees every sample that is compared: streams re-scored by the worker that ran them, training streams of age 0,
held-out logs scored by the learner.

Invariants:
* a difference that is not finite stops the run, whatever the limits;
* samples from one place are never averaged with those from another;
* an empty sample passes `observe`.
"""

from __future__ import annotations

import math

from conf.schema import RunConfig
from streams.log.mismatch import LogpDiff, OffToken, most_telling


class MismatchGate:
    """`observe` samples while training, `judge` a whole one at a stage's end. Both raise RuntimeError above a limit."""

    def __init__(self, config: RunConfig) -> None:
        self.limits = config.monitor.limits(config.model.dtype, config.learner.dtype)
        self._tokens = config.monitor.tokens
        self._pools: dict[str, tuple[LogpDiff, OffToken | None]] = {}

    def observe(self, where: str, diff: LogpDiff, off: OffToken | None) -> None:
        """Judge a sample from `where`. Its means are judged once `monitor.tokens` tokens from there are pooled.

        off: the sample's most telling token. Raises RuntimeError above a limit.
        """
        before, named = self._pools.pop(where, (LogpDiff(), None))
        pooled, named = LogpDiff.merge([before, diff]), most_telling([named, off])
        enough = pooled.tokens >= self._tokens
        self._check(where, pooled, named, means=enough)
        if not enough:
            self._pools[where] = (pooled, named)

    def judge(self, where: str, diff: LogpDiff, off: OffToken | None) -> None:
        """Judge a whole sample. Raises RuntimeError above a limit, or if the sample is empty."""
        if not diff.tokens:
            raise RuntimeError(
                f"learner and engine could not be compared ({where}): no sampled token of a stream of one weight version "
                "came back; see the failed streams named above"
            )
        self._check(where, diff, off, means=True)

    def _check(self, where: str, diff: LogpDiff, off: OffToken | None, *, means: bool) -> None:
        for key in ("max", "mean", "k3") if means else ("max",):
            value, limit = getattr(diff, key), getattr(self.limits, key)
            # Written so that NaN fails, too, and infinity even where the limit is infinite.
            if value is not None and not (math.isfinite(value) and value <= limit):
                raise RuntimeError(_explain(where, diff, off, key, limit))


def _explain(where: str, diff: LogpDiff, off: OffToken | None, key: str, limit: float) -> str:
    k3 = "-" if diff.k3 is None else f"{diff.k3:.2e}"
    value = getattr(diff, key)
    finite = math.isfinite(value)
    above = f"{value:.2e} is above monitor.{key}={limit:g}" if finite else f"{value} is not finite"
    rounding = (
        f"; if it is rounding, raise monitor.{key} (0 = no limit) and run the same command again" if finite else ""
    )
    means = f"{diff.tokens} tokens: mean {diff.mean:.2e}, max {diff.max:.2e}, k3 {k3}"
    return (
        f"learner and engine disagree: {key} difference of log-probs {above} ({where}; {means}). {_named(off)}The gradient "
        "would not be that of what was sampled, so nothing more is trained or published; the journal and the checkpoints of "
        "earlier steps are good. Look at that stream's log from this token back to the eviction before it, and whether "
        f"rollout.attention=torch and learner.attention=sdpa agree{rounding}"
    )


def _named(off: OffToken | None) -> str:
    if off is None:
        return ""
    which = "First token that deviates" if off.above else "Token that deviates most"
    return (
        f"{which}: stream {off.stream}, index {off.index} (id {off.id}, {off.kind}, turn {off.turn}, memory {off.policy}, "
        f"weights version {off.version}): sampled at log-prob {off.behaviour:.6g}, re-scored {off.rescored:.6g} "
        f"({off.rescored - off.behaviour:+.1e}). "
    )

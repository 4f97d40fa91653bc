"""Which of two results is better, and how sure that is: means over streams with bootstrap intervals. Pure.

Invariants:
* two results are compared on the streams that both have watched, drawn together: what is hard for both does not count twice;
* a stream is drawn as a whole, with all of its questions;
* the same streams give the same intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.results import StreamScore

METRICS = ("reward", "timing", "accuracy")
DRAWS, SEED, LEVEL = 10_000, 0, 0.95
AT_ONCE = 2**22
"""Numbers drawn at once, about: memory does not grow with the draws."""
FEW = 30
"""Streams below which an interval is too narrow to be trusted."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of two, with the interval in which 95 % of the draws lie. streams: that it is over."""

    value: float
    low: float
    high: float
    streams: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0: of a difference, that there is one."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired:
    """Two results on the streams that both have. before, after: in the same order. left_out: streams that only one has."""

    before: tuple[StreamScore, ...]
    after: tuple[StreamScore, ...]
    left_out: int


def paired(before: Sequence[StreamScore], after: Sequence[StreamScore]) -> Paired:
    """Return the streams of both that have the same task and were asked the same."""
    known = {(stream.task, stream.asked): stream for stream in after}
    both = [(stream, known[key]) for stream in before if (key := (stream.task, stream.asked)) in known]
    left_out = len(before) + len(after) - 2 * len(both)
    return Paired(tuple(b for b, _ in both), tuple(a for _, a in both), left_out)


def mean(streams: Sequence[StreamScore], metric: str) -> Estimate | None:
    """Return the mean of a metric, one of METRICS, with its interval; None without any stream, or question."""
    parts = _parts(streams, metric)
    return None if parts is None else _estimate(parts, None)


def difference(pair: Paired, metric: str) -> Estimate | None:
    """Return by how much `after` is above `before`, with the interval; None without any stream, or question."""
    before, after = _parts(pair.before, metric), _parts(pair.after, metric)
    return None if before is None or after is None else _estimate(after, before)


def of_category(pair: Paired, category: str) -> Paired:
    """Return the streams of one category."""
    keep = [i for i, stream in enumerate(pair.before) if stream.category == category]
    return Paired(tuple(pair.before[i] for i in keep), tuple(pair.after[i] for i in keep), 0)


def _parts(streams: Sequence[StreamScore], metric: str) -> np.ndarray | None:
    """Return [2, S]: what a metric divides, and by what, of each stream. Timing and accuracy are means over questions."""
    if metric == "reward":
        parts = np.array([[stream.reward for stream in streams], [1.0] * len(streams)])
    else:
        name = "right" if metric == "accuracy" else metric
        parts = np.array([[getattr(stream, name) for stream in streams], [s.questions for s in streams]], float)
    return parts if parts[1].sum() else None


def _estimate(of: np.ndarray, less: np.ndarray | None) -> Estimate:
    """Return the ratio of sums of `of` [2, S], less that of `less`, with the interval of draws of streams."""
    count = of.shape[1]
    generator = np.random.default_rng(SEED)
    drawn: list[np.ndarray] = []
    at_once = max(1, AT_ONCE // count)
    for first in range(0, DRAWS, at_once):
        chosen = generator.integers(0, count, (min(at_once, DRAWS - first), count))
        drawn.append(_ratio(of[:, chosen]) - (0.0 if less is None else _ratio(less[:, chosen])))
    tail = (1 - LEVEL) / 2
    # A draw of streams without any question says nothing.
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    value = _ratio(of) - (0.0 if less is None else _ratio(less))
    return Estimate(float(value), float(low), float(high), count)


def _ratio(parts: np.ndarray) -> np.ndarray:
    """parts: [2, ..., S] -> [...]."""
    sums = parts.sum(-1)
    return sums[0] / np.where(sums[1] > 0, sums[1], np.nan)

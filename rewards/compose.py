"""The reward of a stream: configured terms, multiplied or summed per expected answer, then averaged.

Invariants:
* a total lies in [0, 1] and does not depend on the order of the terms;
* if a term raises, takes too long, or returns anything but one value in [0, 1] per answer, that stream's total is 0 and
  `failed` names the cause; the run goes on;
* settings that cannot work are refused when the config is made.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards import brevity as _brevity  # noqa: F401  (these three register their terms)
from rewards import format as _format  # noqa: F401
from rewards import thinkstream as _thinkstream  # noqa: F401
from rewards.correctness import correct_answers
from rewards.deadline import OutOfTimeError, deadline
from rewards.outcome import StreamOutcome, match_answers
from rewards.registry import Term, build
from rewards.timing import Timing
from streams.data.dataset import at_row
from streams.support.doing import doing

COMBINES = ("product", "weighted_sum")


LONGEST_S = 86_400
"""Timers of the system take no time as long as one likes; a reward has a day."""


@dataclass(frozen=True)
class RewardConfig:
    """The terms of the reward and how they are combined."""

    combine: str = "product"
    """How an answer's terms become one value: `product`, or `weighted_sum` (divided by the sum of the weights)."""
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reward terms: name -> parameters. Two parameters are read here and not passed on: `target`, the name or the
    dotted path (`package.module:attribute`) of the term where the key is another name, and `weight` (above 0,
    default 1; with `reward.combine=weighted_sum` only). There is no default term: a file's terms would be merged
    with it.
    """
    timeout_s: float = 60.0
    """Seconds that a term may take for one stream; a stream whose reward takes longer is left out and named."""
    workers: int = 1
    """Scorers: processes that compute rewards, a few streams at a time each. More of them help where a reward is slow."""

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise ValueError(f"reward.combine={self.combine!r} is not one of {', '.join(COMBINES)}")
        if not 0 < self.timeout_s <= LONGEST_S:
            raise ValueError(
                f"reward.timeout_s={self.timeout_s} must be a positive number of seconds, at most {LONGEST_S:,}"
            )
        if self.workers < 1:
            raise ValueError(f"reward.workers={self.workers} must be at least 1: somebody has to compute the rewards")
        for name, params in self.terms.items():
            _read_term(name, params, self.combine)


@dataclass(frozen=True)
class AnswerResult:
    """The reward of one expected answer.

    Attributes:
        index: its place in the task.
        category: that of the task.
        response_turn: turn of the matched response; None without one.
        due_turn: turn in which it became due.
        correct: whether the matched response is right, whatever its time.
        timing: its timing score, in [0, 1].
        value: its part of the total.
        components: the value of each term; empty if the reward failed.
    """

    index: int
    category: str
    response_turn: int | None
    due_turn: int
    correct: bool
    timing: float
    value: float
    components: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardResult:
    """The reward of a stream. components: mean per term over the answers. failed: cause of a failed call, with the stream."""

    total: float
    components: dict[str, float]
    answers: tuple[AnswerResult, ...]
    failed: str | None = None


class Reward:
    """The configured reward; call it with a stream's outcome."""

    def __init__(
        self, terms: Mapping[str, tuple[Term, float]], combine: str, timeout_s: float = RewardConfig.timeout_s
    ) -> None:
        if not terms:
            raise ValueError("reward.terms is empty: name at least one term, for example reward.terms.correctness={}")
        # Floating-point products depend on their order; a config's order of keys must not.
        self._terms = {name: terms[name] for name in sorted(terms)}
        self._combine, self._timeout_s = combine, timeout_s
        given = [term for term, _ in self._terms.values() if isinstance(term, Timing)]
        self.timing = given[0] if given else Timing()
        """Scores `AnswerResult.timing`: the configured timing term, or its defaults where there is none."""

    @classmethod
    def from_config(cls, config: RewardConfig) -> Reward:
        return cls(
            {name: _read_term(name, params, config.combine) for name, params in config.terms.items()},
            config.combine,
            config.timeout_s,
        )

    @classmethod
    def without_own_terms(cls, config: RewardConfig) -> Reward:
        """Return a reward that knows only `failed`: terms of a user's own, which may be large, are not made."""
        terms: dict[str, tuple[Term, float]] = {}
        for name, params in config.terms.items():
            own = ":" in params.get("target", name)
            terms[name] = (np.zeros_like, 1.0) if own else _read_term(name, params, config.combine)
        return cls(terms, config.combine)

    def __call__(self, outcome: StreamOutcome) -> RewardResult:
        return self._result(outcome, *self._call_terms(outcome))

    def failed(self, outcome: StreamOutcome, cause: str) -> RewardResult:
        """Return the result of a stream whose reward cannot be computed. Calls no term but `timing`."""
        return self._result(outcome, {}, cause)

    def _result(self, outcome: StreamOutcome, values: Mapping[str, np.ndarray], failed: str | None) -> RewardResult:
        count = len(outcome.task.answers)
        combined = np.zeros(count) if failed else self._combined(values)
        timing, correct = self.timing(outcome), correct_answers(outcome)
        answers = tuple(
            AnswerResult(
                index=match.index,
                category=outcome.task.category,
                response_turn=match.response_turn,
                due_turn=match.due_turn,
                correct=correct[match.index],
                timing=float(timing[match.index]),
                value=float(combined[match.index]),
                components={name: float(value[match.index]) for name, value in values.items()},
            )
            for match in match_answers(outcome)
        )
        # A failed stream still has every component, so that means over streams keep their denominators.
        components = {name: 0.0 if failed else float(values[name].mean()) for name in self._terms}
        return RewardResult(float(combined.mean()), components, answers, failed)

    def _call_terms(self, outcome: StreamOutcome) -> tuple[dict[str, np.ndarray], str | None]:
        """Return every term's values, or the cause if one failed: the boundary around a user's reward code."""
        values: dict[str, np.ndarray] = {}
        for name, (term, _) in self._terms.items():
            try:
                with doing(f"reward.terms.{name} of {outcome.task.id}"), deadline(self._timeout_s):
                    given = term(outcome)
                values[name] = _checked(given, len(outcome.task.answers))
            except OutOfTimeError as error:
                # The last frame is the deadline's own.
                where = traceback.extract_tb(error.__traceback__)[-2]
                cause = f"{error} (reward.timeout_s), last in {where.filename}:{where.lineno}"
                return {}, f"stream {outcome.task.id}: reward.terms.{name}: {cause}{at_row(outcome.task)}"
            except Exception as error:  # noqa: BLE001  (the named boundary: costs this stream, not the run)
                where = traceback.extract_tb(error.__traceback__)[-1]
                cause = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
                return {}, f"stream {outcome.task.id}: reward.terms.{name}: {cause}{at_row(outcome.task)}"
        return values, None

    def _combined(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        if self._combine == "product":
            return np.prod(np.stack(list(values.values())), axis=0)
        # The two sums run in the same order, so that a perfect stream is worth exactly 1.
        total, weights = np.zeros_like(next(iter(values.values()))), 0.0
        for name, (_, weight) in self._terms.items():
            total = total + weight * values[name]
            weights += weight
        return total / weights


def _checked(value: Any, count: int) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"returned shape {array.shape}; return one value per expected answer, shape ({count},)")
    wrong = array[~((array >= 0) & (array <= 1))]
    if wrong.size:
        raise ValueError(f"returned {wrong[0]}; every value must lie in [0, 1]")
    return array


def _read_term(name: str, params: Any, combine: str) -> tuple[Term, float]:
    key = f"reward.terms.{name}"
    if not isinstance(params, Mapping):
        raise ValueError(f"{key}={params!r} must be a mapping of parameters; write {{}} for none")
    weight, target = params.get("weight", 1.0), params.get("target", name)
    if "weight" in params and combine != "weighted_sum":
        raise ValueError(f"{key}.weight={weight!r} has a meaning only with reward.combine=weighted_sum; drop it")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"{key}.weight={weight!r} must be a number above 0; remove the term to switch it off")
    if not isinstance(target, str):
        raise ValueError(f"{key}.target={target!r} must be a term's name or package.module:attribute")
    own = {param: value for param, value in params.items() if param not in ("weight", "target")}
    return build(target, own, key), float(weight)

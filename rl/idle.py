"""Counts steps that taught nothing, because within each group all rewards were equal, and says what to look at.

Pure. It reads the metrics that the journal has of every step, so a resumed stage goes on counting.

Invariants:
* it gives notices, and never ends a run;
* the first notice comes after `monitor.idle_steps` such steps in a row, and each further one after twice as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from conf.schema import RunConfig
from rl.metrics import TOTAL, ZERO_STD, term_metric

Values = Mapping[str, float | None]


class IdleWatch:
    """Counts consecutive steps in which every group's rewards had spread 0."""

    def __init__(self, config: RunConfig, before: Iterable[Values] = ()) -> None:
        """before: the metrics of the stage's earlier steps, in order."""
        self._config, self._after = config, config.monitor.idle_steps
        self.steps = 0
        self._all_zero = 0
        self._sums: dict[str, float] = {}
        for values in before:
            self._count(values)

    def see(self, values: Values) -> str | None:
        """Count a step. Returns the notice to print after it; None if there is none."""
        self._count(values)
        if not self._after or self.steps < self._after:
            return None
        times, rest = divmod(self.steps, self._after)
        # times & (times - 1) is 0 for powers of 2: after 1, 2, 4, 8, ... times the number of steps.
        return self._words() if not rest and times & (times - 1) == 0 else None

    def _count(self, values: Values) -> None:
        # Journals of earlier versions lack the share of such groups: their steps do not count.
        idle = values.get(ZERO_STD) == 1.0
        if self._config.algorithm.advantage == "reinforce_pp":
            # Streams are compared with the whole step: groups of equal rewards teach, unless all of them are 0.
            idle = idle and values.get(TOTAL) == 0
        if not idle:
            self.steps, self._all_zero, self._sums = 0, 0, {}
            return
        self.steps += 1
        self._all_zero = self._all_zero + 1 if values.get(TOTAL) == 0 else 0
        for name in self._terms():
            self._sums[name] = self._sums.get(name, 0.0) + (values.get(term_metric(name)) or 0.0)

    def _terms(self) -> list[str]:
        return sorted(self._config.reward.terms)

    def _words(self) -> str:
        means = {name: self._sums[name] / self.steps for name in self._terms()}
        listed = ", ".join(f"{name} {mean:.3g}" for name, mean in means.items())
        if self._all_zero == self.steps:
            what = f"every reward of the last {self.steps} steps is 0"
        else:
            what = f"in each group of the last {self.steps} steps every stream earned the same"
        return (
            f"warning: rl: {what}: every advantage is 0 and nothing is learned. Mean of each reward term: {listed}. "
            f"{self._look(means)}"
        )

    def _look(self, means: Mapping[str, float]) -> str:
        """Return what to look at, judging by the mean of each term."""
        zero = [name for name, mean in means.items() if mean == 0]
        if means and all(mean == 1 for mean in means.values()):
            return "Every stream earns the maximum: the tasks are solved, and only harder ones would teach more"
        temperature = f"rollout.temperature={self._config.rollout.temperature:g}"
        if not zero:
            return (
                f"Check whether the streams of a group differ at all ({temperature}), and whether the tasks are so easy, "
                "or so hard, that all streams earn the same"
            )
        combined = " (with reward.combine=product one term of 0 makes every reward 0)"
        first = f"Look at {', '.join(zero)} first{combined if self._config.reward.combine == 'product' else ''}: "
        return (
            f"{first}does the model answer in the form that the reward expects (transcripts of job=eval)? Can the answers "
            "be given at all (`sightline check` on data.train, in a checkout `python -m streams.data.check`; due before "
            "data.max_turns, shorter than layout.max_new_tokens)? Would a longer cold start, or more than "
            f"{temperature}, let some stream succeed?"
        )

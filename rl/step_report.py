"""Reports an RL step: its metrics, its line on the terminal, and whether it is the last.

Invariants:
* shares of time count from the stage's start in this attempt, durations from the previous step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rl.idle import IdleWatch, Values
from rl.metrics import StepClock, step_metrics
from rl.results import ReadyGroup, RLResult
from rl.saturation import Saturation
from runtime.context import StageContext
from streams.messages import SwapReport, TrainReport


class StepReport:
    """Reports the steps of one stage, in order."""

    def __init__(self, context: StageContext, before: Sequence[Values]) -> None:
        """before: the metrics of the steps of earlier attempts, in order."""
        self._context = context
        self._idle = IdleWatch(context.config, before)
        self._saturation = Saturation(context.config.algorithm, before)
        self._step_began = time.monotonic()
        self._learner_busy_s = 0.0

    def metrics(
        self,
        report: TrainReport,
        groups: Sequence[ReadyGroup],
        ages: Sequence[int],
        swaps: Sequence[SwapReport],
        ready: int,
        result: RLResult,
    ) -> dict[str, float | None]:
        """Return the metrics of a step that has just ended. Arguments: see `rl.metrics.step_metrics`."""
        now = time.monotonic()
        wall, self._step_began = now - self._step_began, now
        self._learner_busy_s += report.metrics["step_s"]
        clock = StepClock(wall, self._learner_busy_s / self._context.seconds())
        values = step_metrics(report, groups, ages, swaps, clock, ready, result)
        self._saturation.see(values)
        return values

    def last_step(self, step: int, result: RLResult) -> int:
        """Return the stage's last step, as `step` and those before it have it: it ends there if the reward is high enough."""
        config = self._context.config.algorithm
        result.saturated_at = self._saturation.reached
        if result.saturated_at is not None and step < self._context.steps:
            self._context.progress.say(
                f"rl: ends with step {step} of {self._context.steps}: the mean reward of the last {config.stop_steps} steps is "
                f"{result.saturated_at:.3f} (algorithm.stop_when={config.stop_when:g})"
            )
            self._context.end_with(step)
        return self._context.steps

    def say(self, step: int, values: dict[str, float | None]) -> None:
        """Print the step's line, and a notice if steps in a row taught nothing."""
        if said := self._idle.see(values):
            self._context.progress.say(said)
        self._context.progress.step(
            "rl",
            step,
            self._context.steps,
            {
                "reward": values["reward/total"],
                "loss": values["train/loss"],
                "entropy": values["train/entropy"],
                "clip": values["train/clip_share"],
                "age": values["age/max"],
                "tok/s": values["rollout/tokens_per_s"],
            },
        )

"""The RL stage with its evaluations: when one is due, what becomes of its result, and the best checkpoint.

Invariants:
* a result is in the journal under its version's step, and decides about `checkpoints/rl/best` once both it and the
  checkpoint of that step are there;
* a checkpoint that may still become the best outlives newer ones.
"""

from __future__ import annotations

from typing import Any

from evals.best import evaluated, named_best
from runtime.checkpointer import FINAL
from runtime.context import StageContext
from runtime.store.checkpoint import promote, read_best, step_name
from runtime.training_stage import TrainingStage
from streams.task import StreamTask


class EvaluatedStage(TrainingStage):
    """A training stage that is evaluated while it trains. `best`: the note of the best checkpoint, {} without one."""

    def __init__(
        self, context: StageContext, heldout: tuple[StreamTask, ...], *, patience: int, group_size: int
    ) -> None:
        """heldout: the rows that evaluations watch, or the first `eval.tasks` of them. Raises ValueError for eval.best."""
        super().__init__(context, patience=patience, group_size=group_size)
        self.heldout = evaluated(context.config, heldout)
        # The start could check eval.best against rows that were there; now the generated ones are, too.
        self._decides = named_best(context.config, heldout).eval.best
        self.best = read_best(self.checkpoints.folder / "best", self.began_at)

    def evaluation_due(self, step: int) -> bool:
        """Whether `eval.every` asks for an evaluation after `step` (the last step's always, if any is asked for)."""
        every = self.context.config.eval.every
        return bool(every) and bool(self.heldout) and (step % every == 0 or step == self.context.steps)

    def name_cut_off(self) -> None:
        """Name evaluations that ended with the attempt before: by now the workers hold newer weights."""
        for line in self.journal.of_kind("step"):
            if line.step < self.began_at and self._awaited(line.step):
                self.context.progress.say(
                    f"rl: the evaluation of step {line.step} was cut off by the end of the run: left out"
                )

    def evaluation_missing(self) -> bool:
        """Whether the stage goes on from a step whose evaluation is still to come."""
        return bool(self.began_at) and self._awaited(self.began_at)

    def evaluated(self, step: int, values: dict[str, float | None]) -> None:
        """Note the result of the evaluation of `step`."""
        shown = ", ".join(
            f"{key.removeprefix('eval/')} {value:.3f}"
            for key, value in values.items()
            if value is not None and key.startswith("eval/")
        )
        self.context.progress.say(f"eval at step {step}: {shown}")
        self.journal.append(step, values, kind="eval")
        self._promote(step)
        self.chart(max(self.written, default=0))

    def completed(self, step: int) -> set[str]:
        """Keep the checkpoint of `step` if it is the best. Returns the names of those that may still become it."""
        self._promote(step)
        return {step_name(written) for written in self.written if self._awaited(written)}

    def _awaited(self, step: int) -> bool:
        return self.evaluation_due(step) and not self.journal.has("eval", step)

    def _promote(self, step: int) -> None:
        """Keep the export of `step` as `best`, if both it and its evaluation are there and it beats the best so far."""
        metric = f"eval/{self._decides}"
        value = next((line.values.get(metric) for line in self.journal.of_kind("eval") if line.step == step), None)
        if step not in self.written or value is None:
            return
        if self.best and self.best["value"] >= value:
            return
        source = self.checkpoints.folder / (FINAL if step == self.context.steps else step_name(step))
        if not source.is_dir():  # the stage was resumed from a checkpoint of another run
            return
        best: dict[str, Any] = {"step": step, "metric": self._decides, "value": value}
        try:
            promote(source, self.checkpoints.folder / "best", best)
        except OSError as error:  # a full disk costs this copy, not the run
            self.context.progress.say(
                f"rl: step {step} is the best so far but could not be kept as checkpoints/rl/best: {error}"
            )
        else:
            self.best = best

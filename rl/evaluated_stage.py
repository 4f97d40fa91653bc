"""The RL stage with its evaluations: when one is due, where its result goes, and which checkpoint is the best.

Invariants:
* a result is in the journal under its version's step;
* `checkpoints/rl/best` is decided on for a step once both its result and its checkpoint are there;
* a checkpoint that may still become the best is not pruned for newer ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.best import evaluated, named_best
from runtime.checkpointer import FINAL
from runtime.context import StageContext
from runtime.store.checkpoint import promote, read_best, step_name
from runtime.training_stage import TrainingStage
from streams.task import StreamTask


class EvaluatedStage(TrainingStage):
    """A training stage that is evaluated while it trains. `best`: step, metric, value of the best checkpoint, or {}."""

    def __init__(
        self,
        context: StageContext,
        tasks: Sequence[StreamTask],
        heldout: Sequence[StreamTask],
        *,
        patience: int,
        group_size: int,
    ) -> None:
        """heldout: the held-out rows, of which evaluations watch all, or the first `eval.tasks`.

        tasks, patience, group_size: see TrainingStage. Raises ValueError if no evaluation has the metric that `eval.best`
        names.
        """
        super().__init__(context, tasks, patience=patience, group_size=group_size)
        self.heldout = evaluated(context.config, heldout)
        # Checked at the start for rows that existed then; by now generated rows exist, too.
        self._decides = named_best(context.config, heldout).eval.best
        self.best = read_best(self.checkpoints.folder / "best", self.began_at)

    def evaluation_due(self, step: int) -> bool:
        """Return whether an evaluation is due after `step`: every `eval.every` steps, and after the last one."""
        every = self.context.config.eval.every
        return bool(every) and bool(self.heldout) and (step % every == 0 or step == self.context.steps)

    def catch_up(self) -> None:
        """Decide about the checkpoint that the stage goes on from, and report evaluations that an earlier attempt left out.

        The checkpoint may have been completed when nobody was there to hear of it. The workers run newer weights by now.
        """
        if self.began_at:
            self._promote(self.began_at)
        for line in self.journal.steps():
            if line.step < self.began_at and self._awaited(line.step):
                self.context.progress.say(
                    f"rl: the evaluation of step {line.step} was cut off by the end of the run: left out"
                )

    def evaluation_missing(self) -> bool:
        """Return whether the stage continues from a step whose evaluation is due and missing."""
        return bool(self.began_at) and self._awaited(self.began_at)

    def evaluated(self, step: int, values: dict[str, float | None]) -> None:
        """Print the result of the evaluation of `step`, write it to the journal, and update the best checkpoint."""
        shown = ", ".join(
            f"{key.removeprefix('eval/')} {value:.3f}"
            for key, value in values.items()
            if value is not None and key.startswith("eval/")
        )
        self.context.progress.say(f"eval at step {step}: {shown}")
        self.journal.append(step, values, kind="eval")
        self._promote(step)
        self.chart(max(self.checkpoints.written, default=0))

    def completed(self, step: int) -> set[str]:
        """Keep the checkpoint of `step` if it is the best. Returns the names of those that may still become the best."""
        self._promote(step)
        return {step_name(written) for written in self.checkpoints.written if self._awaited(written)}

    def _awaited(self, step: int) -> bool:
        return self.evaluation_due(step) and self.journal.evaluation(step) is None

    def _promote(self, step: int) -> None:
        """Keep the export of `step` as `best` if it and its result are there, and the result beats the best so far."""
        metric = f"eval/{self._decides}"
        value = (self.journal.evaluation(step) or {}).get(metric)
        if step not in self.checkpoints.written or value is None:
            return
        if self.best and self.best["value"] >= value:
            return
        source = self.checkpoints.folder / (FINAL if step == self.context.steps else step_name(step))
        if not source.is_dir():  # the stage was resumed from a checkpoint in another run_root
            return
        best: dict[str, Any] = {"step": step, "metric": self._decides, "value": value}
        try:
            promote(source, self.checkpoints.folder / "best", best)
        except OSError as error:  # a full disk fails this copy, not the run
            self.context.progress.say(
                f"rl: step {step} is the best so far but could not be kept as checkpoints/rl/best: {error}"
            )
        else:
            self.best = best

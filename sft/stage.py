"""Stage `sft`: the cold start."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from runtime.recovery.revival import deaths_in_words
from runtime.rows import RowUse
from runtime.run import Run, Stage
from sft.demonstrations import scripted_words
from sft.loop import SftLoop

ROWS = RowUse("sft", "train", trains=True, script=scripted_words)


def run(run: Run) -> dict[str, Any]:
    """Train on demonstrations of the rows that can be demonstrated. Returns the stage's result for its manifest."""
    checkpoint, tasks = run.start_from(ROWS, run.initial_model)
    steps = run.config.sft_steps(len(tasks))
    loop = SftLoop(run.prepare("sft", checkpoint, run.config.sft_learner(steps), steps, tasks), tasks)
    with run.stop.deferred():
        result = loop.run()
    run.report_usage("sft")
    run.files.note(ROWS, result)
    run.progress.say(
        f"sft: {result.steps} steps in {result.seconds:.0f} s, loss {result.first_loss:.3f} -> {result.last_loss:.3f}"
        f"{deaths_in_words(result.deaths)}"
    )
    return asdict(result) | {"kept": [asdict(sample) for sample in run.files.judged["sft"].kept]}


SFT = Stage(
    run,
    uses=lambda config: (ROWS,),
    learner=lambda config: config.sft_learner(1),
    begins=lambda run: (run.initial_model(),),
)

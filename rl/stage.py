"""Stage `rl`: reinforcement learning, with evaluations while it trains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from evals.best import check_best
from evals.stage import ROWS as HELDOUT
from rl.loop import RLLoop
from runtime.checks import Rows
from runtime.recovery.revival import deaths_in_words
from runtime.rows import RowUse
from runtime.run import Run, Stage

ROWS = RowUse("rl", "train", trains=True, own_checkpoint=lambda config: config.algorithm.init != "auto")


def run(run: Run) -> dict[str, Any]:
    """Train on rollouts of the rows that can be answered. Returns the stage's result for its manifest."""
    config = run.config
    checkpoint, tasks = run.start_from(ROWS, lambda: run.start.of_rl(run.initial_model))
    steps = config.rl_steps(len(tasks))
    reference = _reference(run)
    context = run.prepare("rl", checkpoint, config.rl_learner(steps), steps, tasks, reference=reference)
    loop = RLLoop(context, tasks, run.files.tasks("heldout") if config.eval.every else ())
    with run.stop.deferred():
        result = loop.run()
    run.report_usage("rl", result.published_by_kind)
    run.files.note(ROWS, result)
    run.progress.say(
        f"rl: {result.steps} steps in {result.seconds:.0f} s, mean reward {_shown(result.mean_reward_first)} -> "
        f"{_shown(result.mean_reward_last)}, ages up to {result.max_age} (bound {loop.buffer.limits.bound})"
        f"{deaths_in_words(result.deaths)}"
    )
    if result.given_up.groups:
        run.progress.say(f"rl: {result.given_up.in_words}")
    run.gate.judge("learner, on the published weights", result.published, loop.published_off)
    return asdict(result) | {"kept": [asdict(sample) for sample in run.files.judged["rl"].kept]}


def _reference(run: Run) -> Path | None:
    if not run.config.algorithm.kl_coef:
        return None
    return run.start.reference(run.store.read("rl").get("origin"), run.initial_model)


def _begins(run: Run) -> tuple[Path, ...]:
    reference = _reference(run)
    return (run.start.of_rl(run.initial_model), *([reference] if reference else []))


def _uses(config: RunConfig) -> tuple[RowUse, ...]:
    return (ROWS, HELDOUT) if config.eval.every else (ROWS,)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _check(config: RunConfig, rows: Rows) -> None:
    heldout = rows.get("heldout")
    check_best(config, None if heldout is None else heldout.tasks)


RL = Stage(
    run,
    uses=_uses,
    learner=lambda config: config.rl_learner(1),
    check=_check,
    begins=_begins,
)

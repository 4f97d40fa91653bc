"""Stage `eval`: held-out evaluation of what the run made, and its summary."""

from __future__ import annotations

import time
from typing import Any

from evals.job import run_evaluation
from evals.summary import checkpoint_label, print_table, rows_fields, samples, stages_behind, training_fields
from runtime.rows import RowUse
from runtime.run import Run, Stage
from streams.support.files import write_json

ROWS = RowUse(
    "eval", "heldout", trains=False, own_checkpoint=lambda config: config.eval.checkpoint not in ("auto", "best")
)


def run(run: Run) -> None:
    """Evaluate every checkpoint that is asked for, and write `summary.json`."""
    session = run.ready_session()
    checkpoints = run.start.evaluated(checkpoint_label)
    geometries = [run.geometry(checkpoint) for checkpoint in checkpoints.values()]
    tasks = run.files.tasks("heldout")
    run.judge_rows("eval", next(iter(checkpoints.values())))
    run.plan_devices(geometries[0])
    summary, report = run_evaluation(
        run.config,
        session,
        tasks,
        checkpoints,
        run.worker_setup,
        lambda checkpoint: run.learner_setup(checkpoint, run.config.learner, 1),
        run.tracker,
        run.progress,
        run.files.judged["eval"].fits,
    )
    summary["wall_s"] = time.monotonic() - run.began
    _finish(run, summary, stages_behind(run.root, checkpoints.values()))
    run.progress.say(f"summary: {run.root / 'summary.json'}")
    if run.tracker.enabled:
        served = run.tracker.uri.startswith("http")
        how = run.tracker.uri if served else f".venv/bin/mlflow ui --backend-store-uri {run.tracker.uri}"
        run.progress.say(f"metrics: {how}")
    if report is not None:
        run.gate.judge("learner, on held-out logs", report.diff, report.off)


def _finish(run: Run, summary: dict[str, Any], stages: tuple[str, ...]) -> None:
    """Write the summary, and print its table.

    It includes what this run's `stages` that made the evaluated checkpoints measured, every sample that was left out,
    and every sample that was used although it cannot be answered in full.
    """
    results = [run.store.result(stage) for stage in stages]
    skipped = [*run.files.skipped, *samples(summary.pop("skipped_heldout"))]
    kept = [sample for rows in run.files.judged.values() for sample in rows.kept]
    for result in results:
        skipped += samples(result.get("skipped", []))
        kept += samples(result.get("kept", []))
    summary = {
        "seed": run.config.seed,
        **summary,
        **rows_fields(skipped, kept),
        **training_fields(run.store.result("rl") if "rl" in stages else {}),
        "attempts": {stage: run.store.read(stage).get("attempts") for stage in stages},
    }
    write_json(run.root / "summary.json", summary)
    run.tracker.artifact(run.root / "summary.json")
    print_table(run.progress.console, summary)


EVAL = Stage(
    run,
    uses=lambda config: (ROWS,),
    learner=lambda config: config.learner if config.eval.score_logs else None,
    begins=lambda run: tuple(run.start.evaluated(checkpoint_label).values()),
)

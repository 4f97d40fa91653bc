"""The evaluation stage: every checkpoint of the run on the held-out tasks, the conditions, and the mismatch check.

The learner scores the logs of the last checkpoint's evaluation at the same weights. That measures the mismatch between
engine and learner on streams that nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from evals.heldout import Condition, EvalResult, chance, evaluate, learner_mismatch, scripted_rewards
from evals.results import write_results
from evals.summary import heldout_fields, mismatch_fields
from evals.transcripts.record import write_transcripts
from learner.setup import LearnerSetup
from rollout.setup import WorkerSetup
from runtime.cluster.events import MOST_DEATHS
from runtime.cluster.session import Session
from runtime.tracking.metric_names import metric_name
from runtime.tracking.progress import Progress
from runtime.tracking.tracker import Tracker
from streams.backbone.boundary import Boundary
from streams.messages import ScoreReport
from streams.task import StreamTask


def run_evaluation(
    config: RunConfig,
    session: Session,
    tasks: Sequence[StreamTask],
    checkpoints: dict[str, Path],
    worker_setup: Callable[[Path, Boundary], WorkerSetup],
    learner_setup: Callable[[Path], LearnerSetup],
    tracker: Tracker,
    progress: Progress,
    fits: Mapping[str, Mapping[int, str]],
) -> tuple[dict[str, Any], ScoreReport | None]:
    """Evaluate checkpoints. Returns the summary's fields, and the mismatch if it was measured.

    checkpoints: name -> folder, in order. fits: by task id and answer index, the part of a long answer that a turn can
    hold (`runtime.rows`). Raises ValueError if there is no task.
    """
    if not tasks:
        raise ValueError("there is no usable held-out task (see the skipped lines above, and data.heldout)")
    results: dict[str, EvalResult] = {}
    for name, checkpoint in checkpoints.items():
        session.crew.set_up(worker_setup(checkpoint, config.learner.boundary))
        results[name] = evaluate(config, session, tasks, Condition("trained"), progress, name)
        _report(name, results[name], tracker, progress)
    last, checkpoint = list(checkpoints.items())[-1]
    if config.eval.conditions:
        recall = tuple(task for task in tasks if task.category == "recall")
        for condition in (
            Condition("empty_thoughts", empty_thoughts=True),
            Condition("recent_frames", memory=config.memory.recent()),
        ):
            if recall:
                results[condition.name] = evaluate(config, session, recall, condition, progress, last)
                _report(condition.name, results[condition.name], tracker, progress)
    report: ScoreReport | None = None
    if config.eval.score_logs:
        session.setup_learner(learner_setup(checkpoint))
        report = session.score_logs(results[last].payloads, "the learner to score held-out logs")
        for _ in range(MOST_DEATHS):
            if report is not None:
                break
            progress.say(f"eval {last}: logs were lost with a worker that died: its streams are watched again")
            results[last] = evaluate(config, session, tasks, Condition("trained"), progress, last)
            report = session.score_logs(results[last].payloads, "the learner to score held-out logs")
        if report is None:
            raise RuntimeError(f"held-out logs were lost {MOST_DEATHS + 1} times with workers that died")
        tracker.metrics(learner_mismatch(report.diff), step=0)
    write_results(config.root.resolve(), results, config.reward)
    write_transcripts(config, session, results, tuple(checkpoints), tracker, progress)
    oracle, silent = scripted_rewards(config, session, tasks, fits)
    skipped = [asdict(sample) for result in results.values() for sample in result.skipped]
    summary = {
        **heldout_fields(results),
        "recall_chance": chance(tasks, "recall"),
        "reward_scripted_oracle": oracle,
        "reward_always_silent": silent,
        **mismatch_fields(report),
        "skipped_heldout": skipped,
    }
    return summary, report


def _report(name: str, result: EvalResult, tracker: Tracker, progress: Progress) -> None:
    shown = ", ".join(f"{mode} {value:.3f}" for mode, value in result.accuracy.items())
    progress.say(f"eval {name}: n {result.n}, reward {result.reward:.3f}, timing {result.timing:.3f}, accuracy {shown}")
    tracker.metrics({metric_name(f"eval_{name}/{key}"): value for key, value in result.values.items()}, step=0)

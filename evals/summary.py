"""The summary of a run: one JSON file under run_root, and the table that a person sees.

Invariants:
* what was not measured is null, never 0.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.categories import ALL
from evals.heldout import EvalResult
from streams.data.dataset import SkippedSample, counted
from streams.data.synthetic.questions import MODES
from streams.messages import ScoreReport
from streams.support.terminal import visible

CONDITIONS = ("empty_thoughts", "recent_frames")
OWN_RESULTS = ("sft", "rl", *CONDITIONS)
"""The names that a run gives to its own results."""
MAX_LABEL = 100
"""Characters of a checkpoint's label: it is part of file names and of metric names."""
COLUMNS = {"sft": "after SFT", "rl": "after RL"}


def checkpoint_label(path: str | Path) -> str:
    """Return the name of the results of `eval.checkpoint`: its folder's name, or a hub id's last part, as a file name.

    A checkpoint's weights are in `<stage>/<name>/hf` or `<stage>/hf`. The name is never one of a run's own results.
    """
    folder = Path(path)
    # A link keeps the name that the user gave it.
    parts = [
        p for p in (Path(os.path.abspath(folder)) if folder.is_dir() else folder).parts if p not in ("hf", "/", "..")
    ]
    # "final" and "step000020" of every run are called alike: the stage's name in front tells more.
    nested = len(parts) > 1 and (parts[-1] == "final" or re.fullmatch(r"step\d+", parts[-1]))
    label = re.sub(r"[^\w.-]+", "_", "-".join(parts[-2:] if nested else parts[-1:]), flags=re.ASCII).strip("_.")
    if len(label) > MAX_LABEL:
        label = f"{label[:MAX_LABEL]}-{hashlib.blake2b(label.encode(), digest_size=4).hexdigest()}"
    return f"checkpoint-{label}".rstrip("-") if label in (*OWN_RESULTS, "") else label


def evaluation_fields(results: dict[str, EvalResult]) -> dict[str, Any]:
    """Return every result under its own name, with whatever categories its rows have."""
    return {
        "evaluations": {
            name: {
                "reward": result.reward,
                "timing": result.timing,
                "accuracy": result.accuracy[ALL],
                "accuracy_by_category": {k: v for k, v in result.accuracy.items() if k != ALL},
                "n": result.n,
                "n_by_category": result.by_category,
                "streams": len(result.streams),
                "failed_streams": len(result.skipped),
            }
            for name, result in results.items()
        }
    }


def heldout_fields(results: dict[str, EvalResult]) -> dict[str, Any]:
    """Return the fields of the evaluations `sft` and `rl` and of the last checkpoint's conditions, if they were run.

    A checkpoint under another name is in `evaluations` alone: it is neither what this run's SFT nor what its RL has made.
    """
    fields: dict[str, Any] = {}
    for name in ("sft", "rl"):
        result = results.get(name)
        fields[f"heldout_reward_{name}"] = result.reward if result else None
        fields[f"timing_reward_{name}"] = result.timing if result else None
        suffix = "_sft" if name == "sft" else ""
        for mode in MODES:
            fields[f"accuracy_{mode}{suffix}"] = result.accuracy.get(mode) if result else None
        fields[f"accuracy_{name}"] = result.accuracy[ALL] if result else None
    for name in CONDITIONS:
        result = results.get(name)
        fields[f"accuracy_recall_{name}"] = result.accuracy.get("recall") if result else None
    checkpoints = [result for name, result in results.items() if name not in CONDITIONS]
    main = checkpoints[-1] if checkpoints else None
    fields["heldout_n"] = main.n if main else 0
    fields["heldout_n_by_mode"] = main.by_category if main else {}
    sft, rl = results.get("sft"), results.get("rl")
    if sft and rl and sft.reward < 1:
        fields["gap_closed"] = (rl.reward - sft.reward) / (1 - sft.reward)
    return fields | evaluation_fields(results)


def training_fields(rl: dict[str, Any]) -> dict[str, Any]:
    """Return what this run's RL stage measured. rl: the result in its stages/rl.json; {} gives nulls."""
    return {
        "learner_steps": rl.get("steps"),
        "max_age": rl.get("max_age"),
        "weight_versions_seen": len(rl["versions_seen"]) if rl else None,
        "age0_max_abs_logp_diff": rl.get("age0", {}).get("max"),
        "age0_logp_diff_tokens": rl.get("age0", {}).get("tokens", 0),
        "published_max_abs_logp_diff": rl.get("published", {}).get("max"),
        "published_logp_diff_tokens": rl.get("published", {}).get("tokens", 0),
        "worker_max_abs_logp_diff": rl.get("monitor", {}).get("max"),
        "worker_logp_diff_tokens": rl.get("monitor", {}).get("tokens", 0),
        "clips_encoded": rl.get("clips_encoded"),
        "distinct_clips": rl.get("distinct_clips"),
    }


def samples(values: Iterable[dict[str, Any]]) -> list[SkippedSample]:
    """Return the samples that a stage's manifest or a result lists as JSON."""
    return [SkippedSample(**value) for value in values]


def rows_fields(skipped: Iterable[SkippedSample], kept: Iterable[SkippedSample]) -> dict[str, Any]:
    """Return samples left out, and samples used that cannot be answered in full: each once, counted by reason."""
    fields: dict[str, Any] = {}
    for name, found in (("skipped", skipped), ("kept", kept)):
        # Stages that read the same file report the same samples.
        distinct = sorted(set(found), key=lambda sample: (sample.source, sample.reason))
        fields[f"{name}_samples"] = len(distinct)
        fields[f"{name}_by_reason"] = counted(distinct)
        fields[name] = [{"source": s.source, "reason": s.reason, "kind": str(s.kind)} for s in distinct]
    return fields


def stages_behind(root: Path, checkpoints: Iterable[Path]) -> tuple[str, ...]:
    """Return the training stages of this run that made what was evaluated. Only their files may go into its summary.

    An RL checkpoint also comes from the run's SFT.
    """
    made = (root / "checkpoints").resolve()
    stages = {path.resolve().relative_to(made).parts[0] for path in checkpoints if made in path.resolve().parents}
    return tuple(stage for stage in ("sft", "rl") if stage in stages or (stage == "sft" and "rl" in stages))


def mismatch_fields(report: ScoreReport | None) -> dict[str, Any]:
    """Return the fields of held-out logs that the learner scored at their version."""
    return {
        "max_abs_logp_diff": report.diff.max if report else None,
        "mean_abs_logp_diff": report.diff.mean if report else None,
        "k3_logp_diff": report.diff.k3 if report else None,
        "logp_diff_tokens": report.diff.tokens if report else 0,
        "logp_diff_by_kind": {kind: diff.max for kind, diff in report.by_kind.items()} if report else {},
    }


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """Print one column for each evaluated checkpoint, one row for each category; then mismatch and skipped samples."""
    results = {name: r for name, r in summary.get("evaluations", {}).items() if name not in CONDITIONS}
    table = Table(title="held-out streams, greedy", title_justify="left")
    table.add_column("", justify="left")
    for name in results:
        table.add_column(Text(COLUMNS.get(name, name)), justify="right")

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}"

    for label, key in (("reward", "reward"), ("timing", "timing"), ("accuracy, any time", "accuracy")):
        table.add_row(label, *[shown(result[key]) for result in results.values()])
    found = {category for result in results.values() for category in result["accuracy_by_category"]}
    for category in [*[mode for mode in MODES if mode in found], *sorted(found - set(MODES))]:
        cells = [shown(result["accuracy_by_category"].get(category)) for result in results.values()]
        # Text: a category may hold what looks like the console's markup.
        table.add_row(Text(f"  {visible(category)}".replace("\n", "\\n")), *cells)
    console.print(table)
    if any(summary.get(f"accuracy_recall_{name}") is not None for name in CONDITIONS):
        _print_recall(console, summary, shown)
    tokens = summary.get("logp_diff_tokens")
    worst = summary.get("max_abs_logp_diff")
    if tokens and worst is not None:
        console.print(f"learner against engine: largest log-prob difference {worst:.1e} over {tokens} tokens")
    if summary.get("skipped_samples"):
        counts = ", ".join(f"{kind} {count}" for kind, count in summary.get("skipped_by_reason", {}).items())
        console.print(
            f"skipped samples: {summary['skipped_samples']} (named in summary.json): {counts}", soft_wrap=True
        )


def _print_recall(console: Console, summary: dict[str, Any], shown: Callable[[Any], str]) -> None:
    console.print(
        f"recall without thoughts {shown(summary.get('accuracy_recall_empty_thoughts'))}, "
        f"with recent frames only {shown(summary.get('accuracy_recall_recent_frames'))} "
        f"(chance {shown(summary.get('recall_chance'))})"
    )

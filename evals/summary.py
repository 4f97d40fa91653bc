"""The summary of a run: one JSON file under run_root, and the table that a person sees.

Owner: evals. Invariant: what was not measured is null, never 0.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evals.heldout import EvalResult
from streams.messages import ScoreReport


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Atomic: written aside, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def heldout_fields(results: dict[str, EvalResult]) -> dict[str, Any]:
    """Fields of the evaluations `sft`, `rl` and the two conditions of the RL checkpoint, where they were run."""
    fields: dict[str, Any] = {}
    for name in ("sft", "rl"):
        result = results.get(name)
        fields[f"heldout_reward_{name}"] = result.reward if result else None
        fields[f"timing_reward_{name}"] = result.timing if result else None
        suffix = "_sft" if name == "sft" else ""
        for mode in ("now", "recall", "alert"):
            fields[f"accuracy_{mode}{suffix}"] = result.accuracy.get(mode) if result else None
        fields[f"accuracy_{name}"] = result.accuracy["all"] if result else None
    for name in ("empty_thoughts", "recent_frames"):
        result = results.get(name)
        fields[f"accuracy_recall_{name}"] = result.accuracy.get("recall") if result else None
    main = results.get("rl") or results.get("sft")
    fields["heldout_n"] = main.n if main else 0
    fields["heldout_n_by_mode"] = main.by_category if main else {}
    sft, rl = results.get("sft"), results.get("rl")
    if sft and rl and sft.reward < 1:
        fields["gap_closed"] = (rl.reward - sft.reward) / (1 - sft.reward)
    return fields


def mismatch_fields(report: ScoreReport | None) -> dict[str, Any]:
    """Held-out logs scored by the learner at their version."""
    return {
        "max_abs_logp_diff": report.diff.max if report else None,
        "mean_abs_logp_diff": report.diff.mean if report else None,
        "logp_diff_tokens": report.diff.tokens if report else 0,
        "logp_diff_by_kind": {kind: diff.max for kind, diff in report.by_kind.items()} if report else {},
    }


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """Before and after, and what they rest on."""
    table = Table(title="held-out streams, greedy", title_justify="left")
    for column in ("", "after SFT", "after RL"):
        table.add_column(column, justify="left" if not column else "right")

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}"

    for label, before, after in (
        ("reward", "heldout_reward_sft", "heldout_reward_rl"),
        ("timing", "timing_reward_sft", "timing_reward_rl"),
        ("accuracy, any time", "accuracy_sft", "accuracy_rl"),
        ("  now", "accuracy_now_sft", "accuracy_now"),
        ("  recall", "accuracy_recall_sft", "accuracy_recall"),
        ("  alert", "accuracy_alert_sft", "accuracy_alert"),
    ):
        table.add_row(label, shown(summary.get(before)), shown(summary.get(after)))
    console.print(table)
    console.print(
        f"recall without thoughts {shown(summary.get('accuracy_recall_empty_thoughts'))}, "
        f"with recent frames only {shown(summary.get('accuracy_recall_recent_frames'))} "
        f"(chance {shown(summary.get('recall_chance'))})"
    )
    tokens = summary.get("logp_diff_tokens")
    worst = summary.get("max_abs_logp_diff")
    if tokens and worst is not None:
        console.print(f"learner against engine: largest log-prob difference {worst:.1e} over {tokens} tokens")
    if summary.get("skipped_samples"):
        console.print(f"skipped samples: {summary['skipped_samples']} (named in summary.json)")

"""Check the quickstart's bars on its summaries.

    make quickstart SEED=0 && cp outputs/quickstart/summary.json benchmarks/results/quickstart_cpu_seed0.json
    python -m benchmarks.quickstart benchmarks/results/quickstart_cpu_*.json

Variants have other names: `make quickstart ARGS="model=tiny_qwen3_vl"` -> quickstart_cpu_tiny_qwen3_vl.json,
`ARGS="learner.ranks=2 learner.zero_stage=3 sft.learner.threads=1"` -> quickstart_cpu_zero3_two_ranks.json. Their wall time is
reported without a bar.
The table is printed, and written beside the first file as quickstart_cpu.md. Exit status 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import in_words

COLUMNS = (
    ("heldout_reward_sft", "reward SFT"),
    ("heldout_reward_rl", "reward RL"),
    ("timing_reward_sft", "timing SFT"),
    ("timing_reward_rl", "timing RL"),
    ("accuracy_sft", "accuracy SFT"),
    ("accuracy_now", "now"),
    ("accuracy_recall", "recall"),
    ("accuracy_alert", "alert"),
    ("accuracy_recall_recent_frames", "recall, recent frames"),
    ("accuracy_recall_empty_thoughts", "recall, no thoughts"),
    ("max_abs_logp_diff", "max logp diff"),
    ("max_age", "max age"),
    ("wall_s", "wall s"),
)


def missed_bars(s: dict[str, Any], *, timed: bool) -> list[str]:
    """Return the names of the bars that one summary misses. timed: wall time is a bar, too."""
    gap = (s["heldout_reward_rl"] - s["heldout_reward_sft"]) / (1 - s["heldout_reward_sft"])
    modes = ("now", "recall", "alert")
    bars = {
        "RL closes 70 % of the gap": gap >= 0.7,
        "accuracy_sft >= 0.9": s["accuracy_sft"] >= 0.9,
        "no mode loses more than 0.03": all(s[f"accuracy_{m}"] >= s[f"accuracy_{m}_sft"] - 0.03 for m in modes),
        "recall >= 0.85": s["accuracy_recall"] >= 0.85,
        "recall_chance <= 0.35": s["recall_chance"] <= 0.35,
        "recall with recent frames <= chance + 0.1": s["accuracy_recall_recent_frames"] <= s["recall_chance"] + 0.1,
        "max_abs_logp_diff <= 1e-3": s["max_abs_logp_diff"] is not None and s["max_abs_logp_diff"] <= 1e-3,
        "logp_diff_tokens >= 10000": s["logp_diff_tokens"] >= 10_000,
        "learner_steps >= 40": s["learner_steps"] >= 40,
        "max_age >= 1": s["max_age"] >= 1,
        "96 questions per mode": all(s["heldout_n_by_mode"][m] >= 96 for m in modes),
        "oracle 1, silence 0": s["reward_scripted_oracle"] == 1 and s["reward_always_silent"] == 0,
        "within 5 minutes": not timed or s["wall_s"] <= 300,
    }
    return [name for name, held in bars.items() if not held]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="SUMMARY", type=Path)
    paths: list[Path] = parser.parse_args(arguments).paths
    for path in paths:
        if not path.is_file():
            parser.error(f"{path}: there is no such file")
    summaries = {path.stem.removeprefix("quickstart_cpu_"): json.loads(path.read_text()) for path in sorted(paths)}
    lines = ["| run | " + " | ".join(label for _, label in COLUMNS) + " | bars missed |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 2))
    failed = False
    for name, summary in summaries.items():
        missed = missed_bars(summary, timed=name.startswith("seed"))
        failed |= bool(missed)
        cells = [f"{summary[key]:.3g}" if summary[key] is not None else "-" for key, _ in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'; '.join(missed) or 'none'} |")
    text = f"# make quickstart, seeds named in advance (variants: seed 0)\n\n{in_words()}\n\n" + "\n".join(lines) + "\n"
    (paths[0].parent / "quickstart_cpu.md").write_text(text)
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

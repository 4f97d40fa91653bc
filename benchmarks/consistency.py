"""Measure exactness: are the learner's log-probs those that the engine sampled with, for every memory policy?

    python -m benchmarks.consistency --quick
    python -m benchmarks.consistency --json benchmarks/results/consistency_cpu.json

For each policy, backbone and dtype, the real engine runs random streams on a tiny model with loud weights, and the learner's
own function scores them again. The same is done with each of several defects planted, one column per defect.
docs/exactness.md explains the table. Exit status 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import in_words, result_target, write_result
from streams.backbone.kernel_choice import choose_learner_attention
from tests.support.exactness.backbones import MODEL_TYPES, loud_backbone, norms_in_input_dtype
from tests.support.exactness.defects import DEFECTS, NOT_APPLICABLE
from tests.support.exactness.rows import (
    BARS,
    DEFECT_BAR,
    DTYPES,
    FULL,
    POLICIES,
    QUICK,
    VIDEO_EVICTED_BAR,
    Measured,
    Policy,
    Size,
    measure,
)

COLUMNS = ("policy", "backbone", "positions", "dtype", "tokens", "evicted", "video", "mean", "p99", "max", *DEFECTS)


def measure_all(
    policies: list[Policy], backbones: list[str], dtypes: list[str], device: str, size: Size
) -> list[Measured]:
    """Return all rows, backbone by backbone, and report each on stderr."""
    rows = []
    count = len(policies) * len(backbones) * len(dtypes)
    for family in backbones:
        for dtype in dtypes:
            # A proof in fp64 is void if anything inside is rounded to fp32, as the norms are by default.
            norms = norms_in_input_dtype() if dtype == "fp64" else nullcontext()
            attention = "sdpa" if dtype == "fp64" else choose_learner_attention("auto", device).name
            with norms, tempfile.TemporaryDirectory() as folder:
                backbone = loud_backbone(Path(folder), DTYPES[dtype], family, device=device)
                for policy in policies:
                    began = time.perf_counter()
                    rows.append(measure(backbone, policy, dtype, size, attention))
                    took = time.perf_counter() - began
                    name = f"{policy.name} {family} {policy.positions} {dtype}"
                    print(f"{len(rows)}/{count} {name}: {rows[-1].tokens} tokens, {took:.0f} s", file=sys.stderr)
    return rows


def missed(rows: list[Measured], size: Size) -> list[str]:
    """Return every missed bar, by row. An empty measurement is a miss, too."""
    if not rows:
        return ["nothing was measured"]
    return [
        f"{row.policy} {row.backbone} {row.positions} {row.dtype}: {words}"
        for row in rows
        for words in row.misses(size, evicts=row.policy != "full")
    ]


def table(rows: list[Measured]) -> str:
    """Return the table for people: the bars, one line per row, and the reasons for cells without a figure."""
    lines = [
        "Largest |behaviour - re-scored| log-prob of a sampled token, and the same with a defect planted.",
        *(
            f"bar, {name}: " + ", ".join(f"{figure} <= {bar:g}" for figure, bar in bars.items())
            for name, bars in BARS.items()
        ),
        f"bar, fp64: every planted defect > {DEFECT_BAR:g}; video tokens evicted >= {VIDEO_EVICTED_BAR:.0%} (not full)",
        "",
    ]
    cells = [list(COLUMNS)]
    for row in rows:
        share = "-" if row.video_evicted is None else f"{row.video_evicted:.0%}"
        figures = [_short(value) for value in (row.mean, row.p99, row.max)]
        head = [row.policy, row.backbone, row.positions, row.dtype, str(row.tokens), str(row.evicted), share]
        cells.append([*head, *figures, *(_short(row.defects.get(name)) for name in DEFECTS)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    halves = [row for row in rows if row.dtype == "bf16"]
    for row in halves:
        kinds = "; ".join(f"{k} p99 {v['p99']:.1e} max {v['max']:.1e}" for k, v in row.by_kind.items())
        lines.append(f"{row.policy} {row.backbone} bf16: k3 {_short(row.k3)}; {kinds}")
    lines.append("")
    for policy in dict.fromkeys(row.policy for row in rows):
        for why, names in _reasons(policy).items():
            lines.append(f"- {policy}: no {', '.join(names)}: {why}")
    return "\n".join(lines)


def _reasons(policy: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in NOT_APPLICABLE.get(policy, {}).items():
        found.setdefault(why, []).append(name)
    return found


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def strict(value: Any) -> Any:
    """Return `value` for strict JSON: NaN and infinity become null (they have missed their bar)."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def chosen(asked: str, known: list[str], option: str) -> list[str]:
    """Return the names in a comma-separated list. Raises ValueError for an unknown one."""
    names = asked.split(",") if asked else known
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name!r} is not one of {', '.join(known)}")
    return names


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.consistency")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.tokens} tokens a row, not {FULL.tokens}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--policies", default="", help="only these, comma-separated")
    parser.add_argument("--backbones", default="", help="only these, comma-separated")
    parser.add_argument("--json", type=result_target, default="", help="file to write; - for one line at the end")
    options = parser.parse_args(arguments)
    try:
        names = chosen(options.policies, list(dict.fromkeys(policy.name for policy in POLICIES)), "--policies")
        options.backbones = chosen(options.backbones, list(MODEL_TYPES), "--backbones")
    except ValueError as error:
        parser.error(str(error))
    options.policies = [policy for policy in POLICIES if policy.name in names]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this machine has no CUDA device")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    size = QUICK if options.quick else FULL
    dtypes = ["fp64", "fp32", *(["bf16"] if options.device == "cuda" else [])]
    began = time.perf_counter()
    rows = measure_all(options.policies, options.backbones, dtypes, options.device, size)
    wrong = missed(rows, size)
    print(f"{in_words()}\n\n{table(rows)}\n")
    for line in wrong:
        print(f"MISSED {line}")
    print(
        f"{len(rows)} rows, {sum(row.tokens for row in rows)} sampled tokens: "
        + ("missed" if wrong else "every bar reached")
    )
    report = {"rows": [row.named() for row in rows], "ok": not wrong}
    if options.json == "-":
        print(json.dumps(strict(report), allow_nan=False))
    elif options.json:
        beside = [{k: v for k, v in vars(row).items() if k not in row.named()} for row in rows]
        spent = {"quick": options.quick, "device": options.device, "seconds": round(time.perf_counter() - began)}
        write_result(Path(options.json), strict({**spent, **report, "beside": beside, "missed": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

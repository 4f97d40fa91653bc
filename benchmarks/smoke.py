"""What `experiment=gpu_smoke` cost, from the run_root that it leaves.

    python -m benchmarks.gpu smoke                                       runs it on a GPU and records it
    python -m benchmarks.smoke outputs/gpu_smoke                         of a run that is already there

For each process: the bytes estimated before loading beside the peak, time and peak of every phase, kernels compiled. For
the run: the mismatch of learner and engine by kind of token, and the time of every step.

Invariant: `passed` says that the steps were taken, the weights swapped and the learner compared with the engine; a run
that did none of it cannot pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, write_result
from benchmarks.parts import run_part
from runtime.planning.usage import USAGE_FILE
from runtime.store.journal import journal_path, read_lines
from streams.log.mismatch import LogpDiff

STEPS = 3
RUN_ROOT = ROOT / "outputs" / "gpu_smoke"
COLOCATED = "cluster.placement=colocated"
WRITE_EVERY_S = 5.0
"""Least time between two writings of a result while the run goes on."""
STEP_VALUES = ("step/wall_s", "train/step_s", "train/compiles", "rollout/tokens_per_s", "swap/pause_s", "age/max")


def result_of(run_root: Path) -> dict[str, Any]:
    """Return the figures of a finished run's RL stage, from its files. Raises ValueError if it has not finished one."""
    path = run_root / USAGE_FILE
    if not path.is_file() or "rl" not in (usage := json.loads(path.read_text())):
        raise ValueError(
            f"{path} has no stage rl: that run has not finished its RL stage; run experiment=gpu_smoke there"
        )
    processes = usage["rl"]["processes"]
    by_kind = usage["rl"]["mismatch_by_kind"]
    steps = steps_of(run_root)
    mismatch = LogpDiff.merge([LogpDiff(**diff) for diff in by_kind.values()])
    swaps = sum(process["phases"].get("swap", {"calls": 0})["calls"] for process in processes.values())
    return {
        "passed": len(steps) >= STEPS and swaps >= STEPS and mismatch.tokens > 0,
        "compiles": sum(process["compiles"] for process in processes.values()),
        "processes": processes,
        "mismatch": vars(mismatch),
        "mismatch_by_kind": by_kind,
        "steps": steps,
    }


def steps_of(run_root: Path) -> list[dict[str, Any]]:
    """Return what each optimiser step of the RL stage cost, of those taken so far."""
    lines = [line for line in read_lines(journal_path(run_root, "rl")) if line.kind == "step"]
    return [{"step": line.step, **{name: line.values.get(name) for name in STEP_VALUES}} for line in lines]


def run_smoke(path: Path, overrides: tuple[str, ...] = (COLOCATED,), *, limit_s: float | None = None) -> bool:
    """Run the experiment from its beginning; return whether it passed.

    The result is written while it runs, so that a run that fails or is cut off keeps the steps that it took.
    limit_s: seconds after which it is stopped; None: never.
    """
    # Files of an earlier run must not be taken for this one's.
    for left in (RUN_ROOT / USAGE_FILE, journal_path(RUN_ROOT, "rl")):
        left.unlink(missing_ok=True)
    command = [sys.executable, "launch.py", "experiment=gpu_smoke", f"run_root={RUN_ROOT}", "resume=never", *overrides]
    written = 0.0
    chosen: list[str] = []

    def write(measured: dict[str, Any]) -> None:
        write_result(path, {"command": command[1:], "memory": chosen, **measured})

    def on_line(line: str) -> None:
        nonlocal written
        if "memory choice:" in line or "memory estimate:" in line:
            chosen.append(line)
        if time.monotonic() - written >= WRITE_EVERY_S:
            write({"passed": False, "complete": False, "steps": steps_of(RUN_ROOT), "last": line})
            written = time.monotonic()

    done = run_part(command, ROOT, limit_s, on_line)
    if done.status or done.cut_off:
        # A mismatch ends the run after its usage was written, but never with status 0.
        ended = {"status": done.status, "cut_off": done.cut_off, "error": list(done.last)}
        measured: dict[str, Any] = {"passed": False, "complete": False, **ended, "steps": steps_of(RUN_ROOT)}
    else:
        measured = result_of(RUN_ROOT)
    write({"wall_s": done.seconds, **measured})
    return bool(measured["passed"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_root", metavar="RUN_ROOT", type=Path)
    run_root = parser.parse_args(arguments).run_root
    try:
        print(json.dumps(result_of(run_root), indent=2))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

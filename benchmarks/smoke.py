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
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, write_result
from runtime.planning.usage import USAGE_FILE
from runtime.store.journal import journal_path, read_lines
from streams.log.mismatch import LogpDiff

STEPS = 3
RUN_ROOT = ROOT / "outputs" / "gpu_smoke"
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
    steps = [line for line in read_lines(journal_path(run_root, "rl")) if line.kind == "step"]
    mismatch = LogpDiff.merge([LogpDiff(**diff) for diff in by_kind.values()])
    swaps = sum(process["phases"].get("swap", {"calls": 0})["calls"] for process in processes.values())
    return {
        "passed": len(steps) >= STEPS and swaps >= STEPS and mismatch.tokens > 0,
        "compiles": sum(process["compiles"] for process in processes.values()),
        "processes": processes,
        "mismatch": vars(mismatch),
        "mismatch_by_kind": by_kind,
        "steps": [{"step": line.step, **{name: line.values.get(name) for name in STEP_VALUES}} for line in steps],
    }


def run_smoke(path: Path, overrides: tuple[str, ...] = ("cluster.placement=colocated",)) -> bool:
    """Run the experiment from its beginning and write its result, also that of a run that failed."""
    # Files of an earlier run must not be taken for this one's.
    (RUN_ROOT / USAGE_FILE).unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, "launch.py", "experiment=gpu_smoke", f"run_root={RUN_ROOT}", "resume=never", *overrides]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    seconds = round(time.monotonic() - began, 1)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        # A mismatch ends the run after its usage was written, but never with status 0.
        measured: dict[str, Any] = {"passed": False, "status": done.returncode, "error": done.stderr.splitlines()[-20:]}
    else:
        measured = result_of(RUN_ROOT)
    write_result(path, {"command": command[1:], "wall_s": seconds, **measured})
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

"""A long run, watched from outside: does a process, a kind of file or the object store grow, or do steps become slower?

    python -m benchmarks.soak [--steps N] [--run FOLDER] [--json PATH|-]

A real run (data, asynchronous RL with evaluations and checkpoints, MLflow) on a tiny model, whose steps take well under a
second: what a run does once a step, it does thousands of times here. The learning rate is so small that streams stay as long
as they are. The first 200 steps are not judged; then all is compared between there and the end (`benchmarks.soak.judging`).

Exit 1 says that a process has grown by more than 5 % (and 8 MiB), that files have which should not, that the object store was
spilled, or that the last 200 steps took more than 5 % longer than those from 200 to 400; `reasons` says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import hardware, in_words, result_target, versions, write_result
from benchmarks.soak.judging import SPAN, WARM, report
from benchmarks.soak.samples import Sample, look, newest_step
from runtime.store.journal import journal_path, read_lines
from tests.support.killed_runs import Driver
from tests.support.processes import family, still_there

STEPS = 2000
FEWEST = 30
OVERRIDES = (
    "job.stages=[data,rl]",
    "data.synthetic.train_clips=24",
    "data.max_turns=5",
    "layout.think_budget=4",
    "layout.max_new_tokens=8",
    "learner.lr=1e-9",
    "checkpoint.every=20",
    "checkpoint.keep=2",
    "eval.every=50",
    # What it earns says nothing here.
    "monitor.idle_steps=0",
)
EVERY_S, EVERY_S_SHORT = 0.5, 0.05
"""Seconds between two looks; in a run whose compared steps are few, such that some looks fall among them."""
HUNG_S = 300.0
END_S = 180.0
"""How long a run may take to end after its last step."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def watch(root: Path, steps: int) -> tuple[list[Sample], int, str]:
    """Run to the end. Returns the samples, the exit status, and what the run has printed. Raises TimeoutError if it hangs."""
    driver = Driver(root, *OVERRIDES, f"algorithm.steps={steps}")
    known: dict[int, str] = {}
    samples: list[Sample] = []
    journal = journal_path(root, "rl")
    newest, moved, told = 0, time.monotonic(), 0
    pause = EVERY_S if steps >= WARM + 2 * SPAN else EVERY_S_SHORT
    try:
        while driver.process.poll() is None:
            time.sleep(pause)
            now, step = time.monotonic(), newest_step(journal)
            if step != newest:
                newest, moved = step, now
            if now - moved > (HUNG_S if newest < steps else END_S):
                raise TimeoutError(f"nothing new for {now - moved:.0f} s after step {newest}; its log: {driver.log}")
            known |= family(driver.process.pid)
            if 0 < step < steps:
                samples.append(look(driver.process.pid, root, step))
            if step >= told + max(10, steps // 20):
                told = step
                say(f"step {step} of {steps}")
    finally:
        for pid in still_there(known) if driver.process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return samples, driver.process.wait(), driver.output


def soak(root: Path, steps: int) -> dict[str, Any]:
    """Return the report of one run under `root`, which must be new."""
    samples, status, output = watch(root, steps)
    lines = read_lines(journal_path(root, "rl"))
    step_s = {line.step: line.values["step/wall_s"] or 0.0 for line in lines if line.kind == "step"}
    row = report(samples, step_s, steps)
    if status:
        row |= {"ok": False, "reasons": [f"the run ended with status {status}: {output[-2000:]}", *row["reasons"]]}
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}, at least {FEWEST}")
    parser.add_argument("--run", type=Path, help="the run_root, which must not exist yet (default: a temporary one)")
    parser.add_argument("--json", type=result_target, default="", help="a path, or - for standard output")
    given = parser.parse_args(arguments)
    if given.steps < FEWEST:
        parser.error(f"--steps {given.steps}: at least {FEWEST}")
    if given.run is not None and given.run.exists():
        parser.error(f"--run {given.run} exists: name a new folder")
    say(in_words())
    with tempfile.TemporaryDirectory(prefix="soak") as temporary:
        root = (given.run or Path(temporary) / "run").resolve()
        root.parent.mkdir(parents=True, exist_ok=True)
        row = soak(root, given.steps)
    if given.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **row}))
    elif given.json:
        write_result(Path(given.json), row)
    for name, process in row.get("processes", {}).items():
        say(f"{name}: {process['mib_early']} -> {process['mib_late']} MiB ({process['growth_percent']} %)")
    say(json.dumps({key: value for key, value in row.items() if key not in ("processes", "limits")}))
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

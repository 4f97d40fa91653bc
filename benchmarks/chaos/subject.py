"""The run that is attacked: a real driver with real actors, what it has left behind, and what outlives it.

Invariants:
* steps times batch are whole epochs: every (epoch, task) must be trained exactly once, whatever happens;
* a process counts as the run's if it descends from the driver, or is an actor of it or descends from one; and as left behind if
  it lives SETTLE_S after the driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from runtime.store.checkpoint import read_state
from runtime.task_order import names_of
from tests.support.killed_runs import CLIPS, Driver, charts, journal
from tests.support.processes import family, logging_to, still_there

BATCH = 2
STEPS = {"sft": 12, "rl": 24}
OVERRIDES = (
    f"sft.steps={STEPS['sft']}",
    f"algorithm.steps={STEPS['rl']}",
    "checkpoint.every=4",
    "eval.every=8",
    # Hits come at random, so two of them may find the learner at one step.
    "cluster.learner_restarts=1000",
    "cluster.hang_s=20",
)
SETTLE_S = 10.0


class Subject:
    """One run_root, and the driver that works on it."""

    def __init__(self, root: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> None:
        """environment: of the driver, beside this process's."""
        self.root, self._environment = root, environment
        self._overrides = (*OVERRIDES, *overrides)
        self._known: dict[int, str] = {}
        self.start()

    def start(self) -> None:
        """Type the command, again if it was typed before."""
        self.driver = Driver(self.root, *self._overrides, environment=self._environment)

    @property
    def ended(self) -> bool:
        return self.driver.process.poll() is not None

    def steps(self) -> list[str]:
        """The steps that this driver has reported, such as `rl 7`."""
        return re.findall(rf"\b((?:sft|rl) \d+)/(?:{STEPS['sft']}|{STEPS['rl']})\b", self.driver.output)

    def told(self, pattern: str) -> int:
        """How often this driver has said something like this."""
        return len(re.findall(pattern, self.driver.output))

    def look(self) -> None:
        """Remember the processes that the run has now."""
        self._known |= family(self.driver.process.pid) | logging_to(self.root / "logs")

    def left_behind(self) -> list[int]:
        """Wait SETTLE_S after the driver's end; return the processes that are still there."""
        time.sleep(SETTLE_S)
        return still_there(self._known)

    def kill_all(self) -> None:
        """End whatever is left of the run."""
        self.look()
        for pid in still_there(self._known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def audit(self) -> tuple[list[str], list[str]]:
        """What a finished run has lost, and what it has done twice."""
        rows = (self.root / "data" / "train.jsonl").read_text().splitlines()
        tasks = [json.loads(row)["id"] for row in rows]
        assert len(tasks) == CLIPS, "the generator makes one task a clip"
        lost, twice = [], []
        for stage, steps in STEPS.items():
            trained = Counter(names_of(read_state(self.root / "checkpoints" / stage / "final")))
            wanted = {f"{epoch}/{task}" for epoch in range(BATCH * steps // CLIPS) for task in tasks}
            lost += [f"{stage} group {group}" for group in sorted(wanted - trained.keys())]
            twice += [f"{stage} group {group}" for group, count in trained.items() if count > 1 or group not in wanted]
            lines = [line for line in journal(self.root, stage) if line["kind"] == "step"]
            noted = Counter(line["step"] for line in lines)
            lost += [f"{stage} step {step} of the journal" for step in range(1, steps + 1) if step not in noted]
            twice += [f"{stage} step {step} of the journal" for step, count in noted.items() if count > 1]
            if Counter(group for line in lines for group in line["groups"]) != trained:
                twice.append(f"{stage}: journal and checkpoint name different groups")
        runs, charted = charts(self.root)
        twice += [f"{runs} MLflow runs"] if runs != 1 else []
        for metric, stage in (("sft/loss", "sft"), ("train/loss", "rl")):
            points = Counter(charted[metric])
            lost += [f"{metric} of step {step}" for step in range(1, STEPS[stage] + 1) if step not in points]
            twice += [f"{metric} of step {step}" for step, count in points.items() if count > 1]
        return lost, twice

"""Runs of three stages that are killed: a real driver whose output is watched, and what a run must have left behind.

Steps x batch are whole epochs, so every (epoch, task) must have been trained exactly once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from runtime.store.checkpoint import read_state
from runtime.task_order import names_of
from tests.support.project import ROOT

CLIPS, BATCH, STEPS, GROUP_SIZE = 6, 2, 6, 2
EPOCHS = BATCH * STEPS // CLIPS
SETTINGS = (
    "job.stages=[data,sft,rl]",
    "seed=5",
    "data.max_turns=9",
    f"data.synthetic.train_clips={CLIPS}",
    "data.synthetic.heldout_per_mode=1",
    "model.tiny.hidden=64",
    "model.tiny.layers=2",
    "model.tiny.mlp=128",
    f"sft.steps={STEPS}",
    f"sft.batch={BATCH}",
    f"algorithm.steps={STEPS}",
    f"algorithm.groups_per_step={BATCH}",
    f"algorithm.group_size={GROUP_SIZE}",
    f"algorithm.groups_in_flight={2 * BATCH}",
    "reward=weighted",
    "+reward.terms.noise={target: 'tests.support.noisy_reward:noisy', weight: 5}",
    "checkpoint.every=2",
    # What a stage went on from is deleted as soon as there is a newer one: nothing may be read there later.
    "checkpoint.keep=1",
    "eval.every=3",
    "eval.tasks=2",
)
DETERMINISTIC = ("algorithm.mode=sync", "deterministic=true")
LIMIT_S = 300


class Driver:
    """A running `launch.py` whose output can be watched."""

    def __init__(
        self,
        root: Path,
        *overrides: str,
        environment: Mapping[str, str] | None = None,
        settings: tuple[str, ...] = SETTINGS,
    ) -> None:
        """environment: beside this process's. settings: of a run of another kind than the small one."""
        self.log = root.with_name(f"{root.name}.{len(list(root.parent.glob(f'{root.name}.*.log')))}.log")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "launch.py", *settings, f"run_root={root}", *overrides],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whoever runs the tests may ignore it
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for_step(self, stage: str, step: int) -> None:
        """Until the stage reports this step, or the process ends."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            done = [int(n) for n in re.findall(rf"\b{stage} (\d+)/{STEPS}", self.output)]
            if done and max(done) >= step:
                return
            assert time.monotonic() < deadline, f"{stage} did not reach step {step}:\n{self.output}"
            time.sleep(0.02)

    def wait_for(self, said: str) -> None:
        """Until the run says this, a regular expression, or ends."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None and not re.search(said, self.output):
            assert time.monotonic() < deadline, f"nothing like {said!r}:\n{self.output}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def hang_up(self) -> None:
        """As a terminal that goes away does: SIGHUP to all processes of the run that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGHUP)

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=LIMIT_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def pid_of(root: Path, actor: str) -> int:
    """The newest process of an actor, by its log."""
    return int(re.findall(r" pid (\d+),", (root / "logs" / f"{actor}.log").read_text())[-1])


def kill(root: Path, actor: str, number: int = signal.SIGKILL) -> int:
    """Send a signal to the newest process of an actor; returns its pid."""
    pid = pid_of(root, actor)
    with contextlib.suppress(ProcessLookupError):  # killed before, and nobody has noticed yet
        os.kill(pid, number)
    return pid


def journal(root: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (root / "stages" / f"{stage}.steps.jsonl").read_text().splitlines()]


def trained(root: Path, stage: str) -> Counter:
    """How often each (epoch, task) was trained, by the final checkpoint's own account."""
    state = read_state(root / "checkpoints" / stage / "final")
    assert names_of(state, "dropped") == []
    assert state.step == STEPS
    assert len(state.consumed.ranges) == 1, "what has no gap is one range"
    assert not state.consumed.names
    return Counter(names_of(state))


def losses(root: Path, stage: str) -> list[tuple[int, str, str]]:
    prefix = "sft" if stage == "sft" else "train"
    return [
        (line["step"], line["values"][f"{prefix}/loss"].hex(), line["values"][f"{prefix}/grad_norm"].hex())
        for line in journal(root, stage)
        if line["kind"] == "step"
    ]


def first_difference(ours: Path, theirs: Path, stage: str) -> str:
    """The first step whose values differ, with all of them: which of loss, reward, tokens went first tells where to look."""
    for mine, other in zip(journal(ours, stage), journal(theirs, stage), strict=False):
        names = [n for n in mine["values"] if "_s" not in n and mine["values"][n] != other["values"].get(n)]
        if names:
            found = {name: (mine["values"][name], other["values"].get(name)) for name in names}
            return f"{stage} step {mine['step']} ({mine.get('groups')}, {other.get('groups')}): {found}"
    return f"{stage}: no value differs"


def charts(root: Path) -> tuple[int, dict[str, list[int]]]:
    """(number of MLflow runs, steps charted of some metrics)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("sightline").experiment_id])
    metrics = ("sft/loss", "train/loss", "reward/total", "eval/reward")
    return len(runs), {
        name: sorted(point.step for point in client.get_metric_history(runs[0].info.run_id, name)) for name in metrics
    }


EVERY_GROUP_ONCE = {str(epoch): CLIPS for epoch in range(EPOCHS)}
EVERY_STEP = list(range(1, STEPS + 1))


def check_exactly_once(root: Path, output: str = "") -> None:
    """output: of a run whose evaluations may have been cut off, which it says."""
    for stage in ("sft", "rl"):
        counts = trained(root, stage)
        assert set(counts.values()) == {1}, stage
        assert Counter(group.split("/")[0] for group in counts) == EVERY_GROUP_ONCE, stage
        lines = [line for line in journal(root, stage) if line["kind"] == "step"]
        assert [line["step"] for line in lines] == EVERY_STEP
        assert Counter(group for line in lines for group in line["groups"]) == counts
    runs, steps = charts(root)
    assert runs == 1, "every attempt continues the same MLflow run"
    cut_off = {int(step) for step in re.findall(r"the evaluation of step (\d+) was cut off", output)}
    expected = dict.fromkeys(("sft/loss", "train/loss", "reward/total"), EVERY_STEP)
    assert steps == expected | {"eval/reward": sorted({3, 6} - cut_off)}, steps


def exported(root: Path, stage: str) -> dict[str, bytes]:
    """The files of a stage's last weights, by name."""
    return {file.name: file.read_bytes() for file in (root / "checkpoints" / stage / "final" / "hf").iterdir()}


def check_same_bits(root: Path, undisturbed: Path) -> None:
    """Groups, losses and last weights of both stages."""
    for stage in ("sft", "rl"):
        assert trained(root, stage) == trained(undisturbed, stage)
        assert losses(root, stage) == losses(undisturbed, stage), first_difference(root, undisturbed, stage)
        assert exported(root, stage) == exported(undisturbed, stage)

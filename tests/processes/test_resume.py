"""Killed anywhere, a run goes on: nothing is lost, nothing is trained twice, and deterministic losses are the same bits.

Real drivers are killed with SIGKILL at random moments of SFT and RL (the seed of the moments is printed), one is asked
to stop with SIGTERM. Steps x batch are whole epochs, so every (epoch, task) must have been trained exactly once.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

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

    def __init__(self, root: Path, *overrides: str) -> None:
        self.log = root.with_name(f"{root.name}.{len(list(root.parent.glob(f'{root.name}.*.log')))}.log")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "launch.py", *SETTINGS, f"run_root={root}", *overrides],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
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

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=LIMIT_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def moments(rng: random.Random, count: int) -> list[tuple[str, int, float]]:
    """(stage, step, seconds after it) of each kill, in the order in which a run meets them; two meet both stages."""
    stages = [0, 1, *(rng.randrange(2) for _ in range(count - 2))][:count]
    drawn = [(stage, rng.randint(1, STEPS - 1), rng.random() * 0.5) for stage in stages]
    return [("sft" if stage == 0 else "rl", step, pause) for stage, step, pause in sorted(drawn)]


def random_moments(kills: int) -> list[tuple[str, int, float]]:
    seed = random.SystemRandom().randrange(10**6)
    plan = moments(random.Random(seed), kills)
    print(f"kill seed {seed}: {plan}")
    return plan


def killed_and_resumed(root: Path, plan: list[tuple[str, int, float]], *overrides: str) -> list[Driver]:
    """The drivers of one run, each killed at its moment of the plan."""
    drivers = []
    for stage, step, pause in plan:
        driver = Driver(root, *overrides)
        drivers.append(driver)
        driver.wait_for_step(stage, step)
        time.sleep(pause)
        driver.signal(signal.SIGKILL)
        driver.wait()
    return drivers


def journal(root: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (root / "stages" / f"{stage}.steps.jsonl").read_text().splitlines()]


def trained(root: Path, stage: str) -> Counter:
    """How often each (epoch, task) was trained, by the final checkpoint's own account."""
    state = json.loads((root / "checkpoints" / stage / "final" / "state.json").read_text())
    assert state["dropped"] == []
    assert state["step"] == STEPS
    return Counter(state["consumed"])


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


def check_exactly_once(root: Path) -> None:
    for stage in ("sft", "rl"):
        counts = trained(root, stage)
        assert set(counts.values()) == {1}, stage
        assert Counter(group.split("/")[0] for group in counts) == EVERY_GROUP_ONCE, stage
        lines = [line for line in journal(root, stage) if line["kind"] == "step"]
        assert [line["step"] for line in lines] == EVERY_STEP
        assert Counter(group for line in lines for group in line["groups"]) == counts
    runs, steps = charts(root)
    assert runs == 1, "every attempt continues the same MLflow run"
    assert steps == {
        "sft/loss": EVERY_STEP,
        "train/loss": EVERY_STEP,
        "reward/total": EVERY_STEP,
        "eval/reward": [3, 6],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    driver = Driver(root, *DETERMINISTIC)
    assert driver.wait() == 0, driver.output
    return root


def test_two_kills_leave_a_deterministic_run_bit_for_bit_what_it_would_have_been(undisturbed, tmp_path):
    root = tmp_path / "run"
    # The first where cold start is sure to go on from a checkpoint, which is gone when it ends (checkpoint.keep=1).
    plan = [("sft", 4, 0.0), random_moments(2)[1]]
    killed_and_resumed(root, plan, *DETERMINISTIC)
    last = Driver(root, *DETERMINISTIC)
    assert last.wait() == 0, last.output
    assert any("sft: going on from" in log.read_text() for log in tmp_path.glob("run.*.log"))
    check_exactly_once(root)
    for stage in ("sft", "rl"):
        assert trained(root, stage) == trained(undisturbed, stage)
        assert losses(root, stage) == losses(undisturbed, stage), first_difference(root, undisturbed, stage)
    assert len({loss for _, loss, _ in losses(root, "rl")}) > STEPS // 2, (
        "losses that are all alike would prove nothing"
    )
    for name in ("sft", "rl"):
        ours, theirs = (
            {f.name: f.read_bytes() for f in (r / "checkpoints" / name / "final" / "hf").iterdir()}
            for r in (root, undisturbed)
        )
        assert ours.keys() == theirs.keys()
        assert [file for file in ours if ours[file] != theirs[file]] == []


def test_an_asynchronous_run_that_is_killed_and_stopped_trains_every_group_exactly_once(undisturbed, tmp_path):
    root = tmp_path / "run"
    killed_and_resumed(root, random_moments(1))
    asked = Driver(root)
    asked.wait_for_step("rl", 2)
    began = time.monotonic()
    asked.signal(signal.SIGTERM)
    status = asked.wait()
    assert status in (75, 0), asked.output
    assert time.monotonic() - began < 60
    if status == 75:
        assert "with resume=auto goes on from there" in asked.output
        assert re.search(r"rl: stopped at step \d+, checkpoint .*step\d+", asked.output)
        assert "Traceback" not in asked.output
    last = Driver(root)
    assert last.wait() == 0, last.output
    check_exactly_once(root)
    for stage in ("sft", "rl"):
        assert trained(root, stage) == trained(undisturbed, stage)


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(undisturbed):
    before = (undisturbed / "checkpoints" / "rl" / "final" / "state.json").stat().st_mtime_ns
    # As if the driver had been killed between a stage's last checkpoint and the tracker's last write.
    with sqlite3.connect(undisturbed / "mlflow.db") as charted:
        assert charted.execute("DELETE FROM metrics WHERE step > 4").rowcount
    again = Driver(undisturbed, *DETERMINISTIC)
    assert again.wait() == 0, again.output
    for stage in ("data", "sft", "rl"):
        assert f"{stage}: finished before, skipped (resume=auto)" in again.output
    check_exactly_once(undisturbed)
    other = Driver(undisturbed, *DETERMINISTIC, "algorithm.clip_low=0.3")
    assert other.wait() == 2
    assert "algorithm.clip_low=0.3, began with 0.2" in other.output
    assert (undisturbed / "checkpoints" / "rl" / "final" / "state.json").stat().st_mtime_ns == before

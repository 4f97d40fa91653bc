"""Killed anywhere, a run goes on: nothing is lost, nothing is trained twice, and deterministic losses are the same bits.

Real drivers are killed with SIGKILL at random moments of SFT and RL (the seed of the moments is printed), one is asked
to stop with SIGHUP. Steps x batch are whole epochs, so every (epoch, task) must have been trained exactly once.
"""

from __future__ import annotations

import random
import re
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from tests.support.killed_runs import (
    DETERMINISTIC,
    STEPS,
    Driver,
    check_exactly_once,
    check_same_bits,
    losses,
    trained,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


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


def test_two_kills_leave_a_deterministic_run_bit_for_bit_what_it_would_have_been(undisturbed, tmp_path):
    root = tmp_path / "run"
    # The first where cold start is sure to go on from a checkpoint, which is gone when it ends (checkpoint.keep=1).
    plan = [("sft", 4, 0.0), random_moments(2)[1]]
    killed_and_resumed(root, plan, *DETERMINISTIC)
    last = Driver(root, *DETERMINISTIC)
    assert last.wait() == 0, last.output
    assert any("sft: going on from" in log.read_text() for log in tmp_path.glob("run.*.log"))
    check_exactly_once(root)
    check_same_bits(root, undisturbed)
    assert len({loss for _, loss, _ in losses(root, "rl")}) > STEPS // 2, (
        "losses that are all alike would prove nothing"
    )


def test_an_asynchronous_run_that_is_killed_and_stopped_trains_every_group_exactly_once(undisturbed, tmp_path):
    root = tmp_path / "run"
    killed_and_resumed(root, random_moments(1))
    asked = Driver(root)
    asked.wait_for_step("rl", 2)
    began = time.monotonic()
    asked.hang_up()
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

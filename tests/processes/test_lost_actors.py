"""Rollout workers and scorers are killed while a run is under way: it goes on by itself, and ends as if nothing had been.

Real drivers and actors; whoever is killed, and when, is printed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.killed_runs import (
    DETERMINISTIC,
    LIMIT_S,
    STEPS,
    Driver,
    check_exactly_once,
    check_same_bits,
    kill,
    pid_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_deterministic_run_ends_bit_for_bit_as_it_would_have_without_the_deaths(undisturbed, tmp_path):
    root = tmp_path / "run"
    driver = Driver(root, *DETERMINISTIC)
    for stage, step, actor in (
        ("sft", 2, "rollout-0"),
        ("rl", 1, "rollout-1"),
        ("rl", 2, "scorer"),
        ("rl", 4, "rollout-0"),
    ):
        driver.wait_for_step(stage, step)
        kill(root, actor)
    assert driver.wait() == 0, driver.output
    check_exactly_once(root)
    check_same_bits(root, undisturbed)
    for actor in ("rollout-0", "rollout-1", "scorer"):
        assert re.search(rf"{actor} died \(node .*; another process takes its place", driver.output), driver.output
    assert "Traceback" not in driver.output


def test_an_asynchronous_run_outlives_the_deaths_of_all_its_workers_and_scorers(tmp_path):
    """Also between two stages, and in the evaluation, when streams that are over wait for the learner in their memory."""
    root = tmp_path / "run"
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    driver = Driver(root, "job.stages=[data,sft,rl,eval]")
    killed = []
    for stage, step, actors in (
        ("sft", chance.randint(1, 5), ("rollout-0", "rollout-1")),
        ("sft", STEPS, ("scorer", "rollout-0")),  # between two stages, or as the second begins
        ("rl", chance.randint(1, 3), ("rollout-0", "rollout-1", "scorer")),
        ("rl", chance.randint(4, 5), ("rollout-1",)),
    ):
        driver.wait_for_step(stage, step)
        time.sleep(chance.uniform(0, 0.5))
        killed += [(stage, step, kill(root, actor)) for actor in actors]
    driver.wait_for(r"eval rl: n ")
    killed += [("eval", 0, kill(root, actor)) for actor in ("rollout-0", "rollout-1")]
    print(f"seed {seed}: {killed}")
    assert driver.wait() == 0, driver.output
    check_exactly_once(root)
    assert not [pid for _, _, pid in killed if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in driver.output


def test_a_worker_that_dies_over_and_over_ends_the_run_with_the_first_cause(tmp_path):
    root = tmp_path / "run"
    driver = Driver(root)
    driver.wait_for_step("sft", 1)
    seen: set[int] = set()
    give_up = time.monotonic() + LIMIT_S
    while driver.process.poll() is None:
        assert time.monotonic() < give_up, driver.output
        if (pid := pid_of(root, "rollout-0")) not in seen:
            seen.add(kill(root, "rollout-0"))
            assert pid in seen
        time.sleep(0.02)
    assert driver.wait() == 1, driver.output
    assert "rollout-0 died 3 times in a row before it had done anything" in driver.output
    assert re.search(r"the same command with resume=auto (goes on from \S+|starts again)", driver.output)
    assert 3 <= len(seen) <= 4, "the first one may have been at work"


def test_a_worker_that_hangs_is_ended_and_replaced(tmp_path):
    root = tmp_path / "run"
    driver = Driver(root, "cluster.hang_s=15")
    driver.wait_for_step("rl", 1)
    pid = pid_of(root, "rollout-0")
    os.kill(pid, signal.SIGSTOP)
    assert driver.wait() == 0, driver.output
    assert re.search(r"rollout-0 has not answered for \d+ s \(cluster\.hang_s=15\): it is ended", driver.output)
    assert "rl: rollout-0 is there again" in driver.output
    check_exactly_once(root)
    assert not Path(f"/proc/{pid}").exists(), "a process that is stopped is ended, too"

"""The learner is killed while a run is under way: another attempt in the same run goes on from the newest checkpoint."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import pytest

from tests.support.killed_runs import (
    DETERMINISTIC,
    LIMIT_S,
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
    pids = []
    for stage, step, number in (("sft", 3, signal.SIGKILL), ("rl", 1, signal.SIGTERM), ("rl", 5, signal.SIGKILL)):
        driver.wait_for_step(stage, step)
        pids.append(kill(root, "learner", number))
    assert driver.wait() == 0, driver.output
    check_exactly_once(root)
    check_same_bits(root, undisturbed)
    restarted = re.findall(
        r"learner died \(node .*; new processes go on from the newest checkpoint \((.*)\)", driver.output
    )
    assert restarted == ["restart 1 of 3", "loss 1 of 20 from outside", "restart 2 of 3"], driver.output
    assert "2 processes died and were replaced (learner 2)" in driver.output
    assert len(set(pids)) == 3
    assert "Traceback" not in driver.output


def test_an_asynchronous_run_outlives_the_deaths_of_ranks_and_workers_together(tmp_path):
    """Whichever of them is noticed first; a rank that lives on is started anew with the others."""
    root = tmp_path / "run"
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    driver = Driver(root, "job.stages=[data,sft,rl,eval]", "cluster.learner_restarts=9", "learner.ranks=2")
    killed = []
    for stage, step, actors in (
        ("sft", chance.randint(1, 4), ("learner-1", "rollout-0")),
        ("rl", chance.randint(1, 2), ("rollout-1", "learner-0")),
        ("rl", chance.randint(4, 5), ("learner-1", "scorer")),
    ):
        driver.wait_for_step(stage, step)
        time.sleep(chance.uniform(0, 0.5))
        killed += [(stage, step, actor, kill(root, actor)) for actor in actors]
    driver.wait_for(r"eval rl: n ")
    killed.append(("eval", 0, "learner-0", kill(root, "learner-0")))
    print(f"seed {seed}: {killed}")
    assert driver.wait() == 0, driver.output
    check_exactly_once(root, driver.output)
    assert "Traceback" not in driver.output


def test_a_learner_that_dies_again_before_it_got_further_ends_the_run_with_the_first_cause(tmp_path):
    root = tmp_path / "run"
    driver = Driver(root)
    driver.wait_for_step("sft", 1)
    seen: set[int] = set()
    give_up = time.monotonic() + LIMIT_S
    while driver.process.poll() is None:
        assert time.monotonic() < give_up, driver.output
        if pid_of(root, "learner") not in seen:
            seen.add(kill(root, "learner"))
        time.sleep(0.02)
    assert driver.wait() == 1, driver.output
    assert re.search(r"error: the learner died twice at sft step \d+ without getting further", driver.output)
    assert re.search(r"The first time, at sft step \d+: learner died \(node .*, pid \d+\): ", driver.output)
    assert re.search(r"the same command with resume=auto (goes on from \S+|starts again)", driver.output)
    assert len(seen) == 2
    assert not [pid for pid in seen if os.path.exists(f"/proc/{pid}")]


def test_a_learner_that_hangs_is_ended_and_the_stage_goes_on(tmp_path):
    root = tmp_path / "run"
    driver = Driver(root, "cluster.hang_s=15")
    driver.wait_for_step("rl", 1)
    pid = kill(root, "learner", signal.SIGSTOP)
    assert driver.wait() == 0, driver.output
    assert re.search(r"learner has not answered for \d+ s \(cluster\.hang_s=15\): it is ended", driver.output)
    assert re.search(
        r"rl: learner died .*; new processes go on from the newest checkpoint \(restart 1 of 3\)", driver.output
    )
    check_exactly_once(root, driver.output)
    assert not os.path.exists(f"/proc/{pid}"), "a process that is stopped is ended, too"

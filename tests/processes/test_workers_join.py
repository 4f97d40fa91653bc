"""A run begins with the rollout workers that have room, takes another one in when a node joins, and goes on when it is lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal

import pytest

from tests.support.killed_runs import Driver, check_exactly_once, kill, pid_of
from tests.support.processes import family
from tests.support.ray_head import RayHead

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_worker_joins_with_its_node_and_leaves_with_it(tmp_path, monkeypatch):
    root = tmp_path / "run"
    with RayHead(0) as head:
        head.add_node(1)
        for name, value in (head.environment | {"RAY_ADDRESS": head.address}).items():
            monkeypatch.setenv(name, value)
        driver = Driver(root, "cluster.address=auto", "cluster.actor_cpus=0.3")  # three fit, and four are wanted
        driver.wait_for("no node has room for the rollout worker 1")
        driver.wait_for_step("sft", 1)
        assert not (root / "logs" / "rollout-1.log").exists()
        kill(root, "learner", signal.SIGSTOP)  # the run would be over before a node is there
        head.add_node(1)
        driver.wait_for(r"rollout-1 is there \(pid")
        kill(root, "learner", signal.SIGCONT)
        driver.wait_for_step("rl", 2)
        assert driver.process.poll() is None, driver.output
        worker = pid_of(root, "rollout-1")
        (lost,) = [node for processes in head.nodes if worker in (node := family(processes))]
        for pid in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert driver.wait() == 0, driver.output
    check_exactly_once(root, driver.output)
    assert "rollout-1 died" in driver.output
    assert "Traceback" not in driver.output


def test_too_few_workers_with_room_end_a_run_with_the_arithmetic(tmp_path, monkeypatch):
    root = tmp_path / "run"
    with RayHead(0) as head:
        head.add_node(1)
        head.add_node(1)
        for name, value in (head.environment | {"RAY_ADDRESS": head.address}).items():
            monkeypatch.setenv(name, value)
        driver = Driver(
            root, "cluster.address=auto", "cluster.actor_cpus=0.5", "rollout.min_workers=2", "cluster.wait_s=3"
        )
        driver.wait_for_step("sft", 2)
        learner = pid_of(root, "learner")
        pids = {pid_of(root, f"rollout-{worker}") for worker in range(2)}
        (lost,) = [n for p in head.nodes if pids & set(n := family(p)) and learner not in n]
        for pid in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert driver.wait() == 1, driver.output
    said = r"error: waited 3 s \(cluster\.wait_s\) with room for [01] rollout workers, and 2 are needed \(rollout\.min_workers"
    assert re.search(said, driver.output), driver.output
    assert "0.5 CPUs" in driver.output

"""A node of a cluster is lost with all that runs on it: what it held starts anew where there is room, and the run goes on."""

from __future__ import annotations

import re

import pytest

from tests.support.killed_runs import Driver, check_exactly_once, pid_of
from tests.support.noisy_reward import SLOW_VARIABLE
from tests.support.processes import family
from tests.support.ray_head import RayHead

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_node_of_learner_and_worker_is_lost_and_another_one_takes_their_place(tmp_path):
    root = tmp_path / "run"
    with RayHead(0) as head:
        for _ in range(3):
            head.add_node(1)
        # Four actors fill two of the three nodes.
        driver = Driver(root, "cluster.address=auto", "cluster.actor_cpus=0.5", environment=head.joining)
        driver.wait_for_step("rl", 3)
        assert driver.process.poll() is None, driver.output
        learner = pid_of(root, "learner")
        (node,) = [node for node in head.nodes if learner in family(node)]
        head.lose_node(node)
        assert driver.wait() == 0, driver.output
        check_exactly_once(root, driver.output)
        assert re.search(r"rl: learner died.*; new processes go on from the newest checkpoint \(loss", driver.output)
        assert "from outside" in driver.output
        assert "restart 1 of 3" not in driver.output, "a node that is lost is nothing that the learner did"
        assert "Traceback" not in driver.output


def test_the_node_of_one_scorer_is_lost_and_the_other_one_computes_all_rewards(tmp_path, monkeypatch):
    monkeypatch.setenv(SLOW_VARIABLE, "0.2")  # both have something to do
    root = tmp_path / "run"
    slowly = "reward.terms.noise.target=tests.support.noisy_reward:slowly"
    with RayHead(0) as head:
        for _ in range(5):
            head.add_node(1)
        # Each of the five actors fills a node.
        joining = head.joining | {SLOW_VARIABLE: "0.2"}
        driver = Driver(
            root, "cluster.address=auto", "cluster.actor_cpus=1", "reward.workers=2", slowly, environment=joining
        )
        driver.wait_for_step("rl", 2)
        assert driver.process.poll() is None, driver.output
        scorer = pid_of(root, "scorer-1")
        (node,) = [node for node in head.nodes if scorer in family(node)]
        head.lose_node(node)
        assert driver.wait() == 0, driver.output
        check_exactly_once(root, driver.output)
        assert "no node has room for scorer-1: it starts when one has" in driver.output
        assert "Traceback" not in driver.output

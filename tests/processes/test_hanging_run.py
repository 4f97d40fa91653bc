"""A run in which nothing happens any more says what every thread of its actors is doing, and ends with what it waited for."""

from __future__ import annotations

import re
import signal

import pytest

from tests.support.killed_runs import Driver, kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_that_gives_up_waiting_says_what_its_actors_are_doing(tmp_path):
    root = tmp_path / "run"
    driver = Driver(root, "cluster.call_timeout_s=20", "algorithm.steps=60")
    driver.wait_for(r"\brl \d+/60")
    kill(root, "learner", signal.SIGSTOP)
    assert driver.wait() == 1, driver.output
    said, _, error = driver.output.rpartition("error: ")
    assert re.match(r"waited 20 s \(cluster\.call_timeout_s\) and nothing finished of: .*optimiser step", error), error
    assert re.search(
        r"^.*stacks of learner, rollout-0, rollout-1, scorer are at the end of their logs", said, re.MULTILINE
    )
    assert re.search(r"^  learner: ", said, re.MULTILINE)
    for worker in ("rollout-0", "rollout-1"):
        assert re.search(rf"^  {worker}: .*: waits for a group or new weights, for \d+ s", said, re.MULTILINE), said
        log = (root / "logs" / f"{worker}.log").read_text()
        assert "most recent call first" in log
        assert re.search(rf"{worker} was asked what it is doing: .*waits for a group or new weights", log)

"""Ray itself is lost while a run is under way: the run names it, saves what can be saved, and the same command goes on.

Real drivers, a Ray of their own or a cluster.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from runtime.store.checkpoint import read_state
from runtime.task_order import names_of
from tests.support.killed_runs import BATCH, CLIPS, Driver, journal
from tests.support.noisy_reward import SLOW_VARIABLE
from tests.support.processes import command, family, logging_to, still_there
from tests.support.ray_head import RayHead

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 36
LEFT_S = 10.0
OVERRIDES = (f"algorithm.steps={STEPS}", "reward.terms.noise.target=tests.support.noisy_reward:slowly", "eval.every=0")


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """RL steps take a second, so that a run is not over before it has noticed."""
    monkeypatch.setenv(SLOW_VARIABLE, "0.25")


def end_ray_of(processes: dict[int, str], name: str) -> int:
    """Kill Ray's process of this name among these; returns its pid."""
    (pid,) = [pid for pid in processes if Path(command(pid).partition(" ")[0]).name == name]
    os.kill(pid, signal.SIGKILL)
    return pid


def tracked(root: Path) -> list[str]:
    """The statuses of the MLflow runs."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("sightline").experiment_id])
    return [run.info.status for run in found]


def check_goes_on_from(root: Path, step: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """The same command goes on after `step`, and has trained everything exactly once when it ends."""
    monkeypatch.delenv(SLOW_VARIABLE)
    driver = Driver(root, *OVERRIDES, *overrides)
    assert driver.wait() == 0, driver.output
    assert int(re.findall(rf"\brl (\d+)/{STEPS}", driver.output)[0]) == step + 1, driver.output
    consumed = names_of(read_state(root / "checkpoints" / "rl" / "final"))
    assert Counter(group.split("/")[0] for group in set(consumed)) == {
        str(n): CLIPS for n in range(STEPS * BATCH // CLIPS)
    }
    assert len(consumed) == STEPS * BATCH
    assert [line["step"] for line in journal(root, "rl") if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert tracked(root) == ["FINISHED"]


# A third worker waits for room, about which Ray is asked over and over.
ABSENT = ("rollout.workers=3", "rollout.min_workers=2", "cluster.actor_cpus=0.25", "cluster.num_cpus=1")


@pytest.mark.parametrize("absent", [(), ABSENT], ids=["all are there", "one is absent"])
def test_without_its_gcs_a_run_writes_a_last_checkpoint_and_says_what_is_lost(tmp_path, monkeypatch, absent):
    root = tmp_path / "run"
    driver = Driver(root, *OVERRIDES, *absent, "checkpoint.every=1000")
    driver.wait_for(rf"\brl 3/{STEPS}")
    assert ("no node has room for the rollout worker 2" in driver.output) == bool(absent)
    processes = family(driver.process.pid)
    end_ray_of(processes, "gcs_server")
    began = time.monotonic()
    driver.process.wait(timeout=60)
    print(f"ended after {time.monotonic() - began:.1f} s\n{driver.output}")
    assert driver.wait() == 1, driver.output
    time.sleep(LEFT_S)
    assert not still_there(processes)
    assert re.search(
        r"error: Ray's GCS at \S+ has not answered for \d+ s \(.*refused.*gcs_server process is gone", driver.output
    )
    assert "Traceback" not in driver.output
    (step,) = re.findall(
        r"the same command with resume=auto goes on from \S+/rl/step(\d+)$", driver.output, re.MULTILINE
    )
    assert tracked(root) == ["FAILED"]
    check_goes_on_from(root, int(step), monkeypatch, *absent, "checkpoint.every=1000")


def test_without_its_raylet_a_run_names_it_and_no_other_culprit(tmp_path, monkeypatch):
    root = tmp_path / "run"
    driver = Driver(root, *OVERRIDES, "checkpoint.every=2")
    driver.wait_for(rf"\brl 3/{STEPS}")
    processes = family(driver.process.pid)
    end_ray_of(processes, "raylet")
    began = time.monotonic()
    driver.process.wait(timeout=60)
    print(f"ended after {time.monotonic() - began:.1f} s\n{driver.output}")
    assert driver.wait() == 1, driver.output
    time.sleep(LEFT_S)
    assert not still_there(processes)
    assert re.search(r"^error: the raylet of this node.* is gone", driver.output, re.MULTILINE)
    assert "died" not in driver.output
    (step,) = re.findall(
        r"the same command with resume=auto goes on from \S+/rl/step(\d+)$", driver.output, re.MULTILINE
    )
    assert tracked(root) == ["FAILED"]
    check_goes_on_from(root, int(step), monkeypatch, "checkpoint.every=2")


def test_without_the_head_of_its_cluster_a_run_names_both(tmp_path):
    """`ray start --block` ends a node when one of its processes does."""
    root = tmp_path / "run"
    with RayHead(3) as head:
        driver = Driver(root, *OVERRIDES, "cluster.address=auto", "cluster.actor_cpus=0.5", environment=head.joining)
        driver.wait_for(rf"\brl 3/{STEPS}")
        (node,) = head.nodes
        actors = logging_to(root / "logs")
        assert len(actors) >= 4
        end_ray_of(family(node), "gcs_server")
        began = time.monotonic()
        driver.process.wait(timeout=60)
        print(f"ended after {time.monotonic() - began:.1f} s\n{driver.output}")
        assert driver.wait() == 1, driver.output
        time.sleep(LEFT_S)
        assert not still_there(actors)
    assert re.search(
        rf"error: Ray's GCS at \S+:{head.port} does not answer .*, and the raylet of this node", driver.output
    )
    assert re.search(r"goes on from \S+/rl/step\d+$", driver.output, re.MULTILINE)
    assert tracked(root) == ["FAILED"]

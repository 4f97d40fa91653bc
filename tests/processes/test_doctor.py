"""job=doctor: what it says of a run that would start, and of one that would not, and that it changes nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from runtime.store.runlock import RunLock
from tests.support.commands import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = (
    "job=doctor",
    "data.max_turns=9",
    "data.synthetic.train_clips=6",
    "model.tiny.hidden=64",
    "model.tiny.layers=2",
    "model.tiny.mlp=128",
    "rollout.workers=1",
    "algorithm.steps=4",
)


def told(output: str) -> dict[str, list[str]]:
    """The checks by their mark."""
    found: dict[str, list[str]] = {}
    for mark, what in re.findall(r"(?m)^(ok|warning|problem|not checked) +([^:]+): ", output):
        found.setdefault(mark, []).append(what)
    return found


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_run_that_would_start_is_told_so_and_nothing_of_the_look_is_left(tmp_path):
    root = tmp_path / "new" / "run"
    done = launch(*SETTINGS, f"run_root={root}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("this run would start\n")
    found = told(done.stdout)
    assert set(found) == {"ok"}, done.stdout
    for stage in ("sft", "rl"):
        for what in ("rows", "weights", "disk", "clips", "object store", "kernels"):
            assert f"{what} of {stage}" in found["ok"], done.stdout
    assert "stages: data begins, sft begins, rl begins, eval runs" in done.stdout
    assert "rows of rl: 6 can be used" in done.stdout
    assert "rollout worker 0: attention torch (no CUDA, the device is cpu)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_problem_is_listed_and_a_run_root_in_use_stays_as_it_is(tmp_path):
    root = tmp_path / "run"
    lock = RunLock(root).acquire()
    try:
        (root / "data").mkdir()
        (root / "data" / "kept.txt").write_text("kept")
        before = contents(root)
        done = launch(
            *SETTINGS,
            f"run_root={root}",
            "resume=never",
            "data=jsonl",
            f"data.train={tmp_path / 'nowhere.jsonl'}",
            f"data.heldout={tmp_path / 'nothing.jsonl'}",
            "model.path=/nonexistent/model",
            "tracking.uri=http://127.0.0.1:9",
        )
        assert done.returncode == 2, done.stdout + done.stderr
        found = told(done.stdout)
        assert found["problem"] == ["data.train", "data.heldout", "checkpoints", "use of run_root"], done.stdout
        assert found["warning"] == ["MLflow"], done.stdout
        assert found["not checked"] == ["stages", "cluster, rows, room, devices, kernels"]
        assert f"is in use by another run: pid {os.getpid()} on" in done.stdout
        assert done.stdout.endswith("this run would not start: 4 problems\n")
        assert contents(root) == before
    finally:
        lock.release()


def test_what_only_the_cluster_shows_keeps_a_run_from_starting(tmp_path):
    root = tmp_path / "run"
    crowded = launch(*SETTINGS, f"run_root={root}", "cluster.actor_cpus=1", "cluster.num_cpus=2")
    assert crowded.returncode == 2, crowded.stdout + crowded.stderr
    assert told(crowded.stdout)["problem"] == ["placement"]
    assert "the actors need 3 CPUs" in crowded.stdout
    small = launch(
        *SETTINGS, f"run_root={root}", "rollout.kv_memory_mb=1", "model.tiny.hidden=256", "model.tiny.layers=8"
    )
    assert small.returncode == 2, small.stdout + small.stderr
    assert told(small.stdout)["problem"] == ["devices"], small.stdout
    assert "the largest stream may hold" in small.stdout
    assert not root.exists()

"""A run that its memory estimate refuses is corrected as it advises, in the same run_root: real drivers and actors."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.commands import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (
    "job.stages=[data,sft,rl]",
    "seed=5",
    "data.max_turns=9",
    "data.synthetic.train_clips=4",
    "data.synthetic.heldout_per_mode=1",
    # 8,192 bytes a token: the pool of 1 MiB below is too small for nine turns.
    "model.tiny.hidden=256",
    "model.tiny.layers=8",
    "model.tiny.mlp=128",
    "sft.steps=2",
    "sft.batch=2",
    "algorithm.steps=2",
    "algorithm.groups_per_step=2",
    "algorithm.group_size=2",
    "algorithm.groups_in_flight=4",
    "reward=weighted",
    "checkpoint.every=1",
    "rollout.kv_memory_mb=1",
    "rollout.workers=1",
)


def parameters(root) -> list[tuple[str, str]]:
    """(status, data.max_turns) of each MLflow run, the oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("sightline").experiment_id])
    runs = sorted(runs, key=lambda run: run.info.start_time)
    return [(run.info.status, run.data.params["data.max_turns"]) for run in runs]


def test_the_advice_of_a_memory_refusal_works_in_the_same_run_root(tmp_path):
    root = tmp_path / "run"
    settings = (*SETTINGS, f"run_root={root}")
    refused = launch(*settings)
    assert refused.returncode == 1
    assert re.search(
        r"the largest stream may hold \d+ tokens .*or hold less: memory\.window, .*data\.max_turns", refused.stderr
    )
    assert json.loads((root / "stages" / "sft.json").read_text())["status"] == "begun"
    corrected = (*settings, "data.max_turns=3", "memory.window=2")
    done = launch(*corrected)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "data: finished before, skipped" in done.stdout
    assert "sft: starts over, the attempt before left nothing to go on from; now with data.max_turns=3" in done.stdout
    for stage in ("sft", "rl"):
        manifest = json.loads((root / "stages" / f"{stage}.json").read_text())
        assert (manifest["status"], manifest["settings"]["data.max_turns"]) == ("finished", 3)
    assert parameters(root) == [("FAILED", "9"), ("FINISHED", "3")], "no chart shows the settings that failed"
    again = launch(*corrected)
    assert again.returncode == 0
    assert "rl: finished before, skipped" in again.stdout
    assert len(parameters(root)) == 2
    other = launch(*settings, "data.max_turns=4", "memory.window=2")
    assert other.returncode == 2
    assert "data.max_turns=4, began with 3" in other.stderr

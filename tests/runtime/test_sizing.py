"""What cannot be placed or cannot fit stops at start, with the arithmetic; and the smoke run, small, on a CPU."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.smoke import result_of
from tests.support.commands import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "resume=never",
    "tracking.enabled=false",
    "data.synthetic.train_clips=6",
    "data.synthetic.heldout_per_mode=2",
    "model.tiny.hidden=64",
    "model.tiny.layers=2",
)


def test_what_cannot_fit_stops_at_start_with_the_arithmetic(tmp_path):
    """Through real actors, once: what else is refused, and how it is said, is in test_footprint, _freezing, _placement."""
    # A forward of ten million tokens.
    huge = (
        "algorithm.groups_per_step=20000",
        "algorithm.groups_in_flight=20000",
        "learner.micro_batch_tokens=10000000",
    )
    done = launch(f"run_root={tmp_path / 'out'}", *SMALL, *huge, limit_s=240)
    said = r"GiB free .* for 2 x rollout worker .*learner [\d.]+ GiB \(weights .* too many\. Ways out: "
    assert re.search(said, done.stderr), done.stderr + done.stdout
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("checkpoints/**/*.json"))


def test_the_smoke_run_is_small_with_the_tiny_model_and_says_what_everything_took(tmp_path):
    """All of experiment=gpu_smoke but the sizes: frames of 8 video tokens."""
    done = launch(
        "experiment=gpu_smoke",
        "model=tiny",
        f"run_root={tmp_path / 'out'}",
        "data.synthetic.frame=[56,112]",
        "data.video.min_pixels=6272",
        "data.video.max_pixels=6272",
        "data.synthetic.train_clips=8",
        "learner.row_tokens=1100",
        limit_s=500,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("memory estimate: ") >= 3
    assert re.search(
        r"usage: learner: load .*forward .*backward .*optimiser step .*publish .*peak .*, estimated", done.stdout
    )
    assert "mismatch of learner and engine on the published weights" in done.stdout
    report = json.loads((tmp_path / "out" / "usage.json").read_text())["rl"]
    worker = report["processes"]["rollout worker 0"]
    assert worker["phases"]["swap"]["calls"] == 3
    assert {"encode", "engine step"} <= worker["phases"].keys()
    steps = [json.loads(line) for line in (tmp_path / "out" / "stages" / "rl.steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    # Memory holds 8 of 20 chunks: 12 x 8 video tokens leave every one of 16 streams.
    assert all(step["values"]["rollout/evicted_tokens"] == 16 * 12 * 8 for step in steps)
    for diff in report["mismatch_by_kind"].values():
        assert diff["mean"] < 1e-5
        assert 0 <= diff["k3"] < 1e-8
    recorded = result_of(tmp_path / "out")
    assert recorded["passed"]
    assert recorded["processes"] == report["processes"]
    assert recorded["mismatch"]["tokens"] == sum(diff["tokens"] for diff in report["mismatch_by_kind"].values()) > 0
    # No optimiser state was written: checkpoint.optimizer=none.
    assert not list((tmp_path / "out" / "checkpoints").rglob("deepspeed"))

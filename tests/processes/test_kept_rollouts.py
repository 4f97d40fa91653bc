"""Finished rollouts in a checkpoint are trained on by the run that goes on from it: a real driver and actors."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from runtime.store.checkpoint import verify
from tests.support.killed_runs import Driver, check_exactly_once, journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEEP = ("checkpoint.keep_rollouts=true", "checkpoint.every=1", "checkpoint.keep=9", "algorithm.groups_in_flight=8")


def test_a_run_that_goes_on_trains_on_what_its_checkpoint_has_kept(tmp_path):
    root = tmp_path / "run"
    first = Driver(root, *KEEP)
    first.wait_for_step("rl", 3)
    first.signal(signal.SIGKILL)
    first.wait()
    folder = root / "checkpoints" / "rl"
    second = Driver(root, *KEEP, "resume=auto")
    assert second.wait() == 0, second.output
    said = second.output
    # A checkpoint may have been completed after the kill.
    goes_on = re.search(r"rl: going on from (\S+)", said)
    assert goes_on, said
    newest = Path(goes_on[1])
    verify(newest)
    stored = [json.loads(path.read_text())["summary"] for path in sorted((newest / "rollouts").glob("*.json"))]
    assert stored, "a learner that is slower than its workers finds finished groups"
    assert f"rl: {len(stored)} finished groups of the checkpoint are not rolled out again" in said
    assert "is rolled out again:" not in said
    check_exactly_once(root, first.output + said)
    trained = [group for line in journal(root, "rl") if line["kind"] == "step" for group in line["groups"]]
    step = int(re.findall(r"\d+", newest.name)[0])
    left = trained[2 * step :]
    order = [left.index(summary["group"]) for summary in stored]
    assert order == sorted(order), "they keep their places"
    assert not list((folder / "final").glob("rollouts")), "nobody goes on from the last one"

"""Rewards that cannot be interrupted, or end their scorer, cost the groups that they are of: a real driver and actors."""

from __future__ import annotations

import json
import re

import pytest

from runtime.store.checkpoint import read_state
from runtime.task_order import names_of
from tests.support.killed_runs import CLIPS, Driver, journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HANGS, DIES = "train-0004-now", "train-0003-recall"
SETTINGS = (
    "reward.workers=2",
    "reward.timeout_s=1",
    f"+reward.terms.deadly={{target: 'tests.support.deadly_reward:Deadly', hangs: {HANGS}, dies: {DIES}}}",
    "sft.steps=2",
    "algorithm.steps=2",
    "eval.every=0",
)
"""Two steps train all clips but those two."""


def test_rewards_that_hang_in_native_code_or_end_their_scorer_cost_their_groups(tmp_path):
    root = tmp_path / "run"
    driver = Driver(root, *SETTINGS)
    assert driver.wait() == 0, driver.output
    state = read_state(root / "checkpoints" / "rl" / "final")
    assert sorted(names_of(state, "dropped")) == [f"0/{DIES}", f"0/{HANGS}"]
    trained = [group for line in journal(root, "rl") if line["kind"] == "step" for group in line["groups"]]
    assert len(trained) == len(set(trained)) == CLIPS - 2
    assert not {f"0/{HANGS}", f"0/{DIES}"} & set(trained)
    said = driver.output
    stuck = r"its reward took longer than reward.timeout_s and could not be interrupted."
    causes = {HANGS: rf"{stuck} It was in __call__, \S+deadly_reward\.py:\d+\.", DIES: r".* it was killed .*"}
    for task, cause in causes.items():
        died = rf"every reward failed: stream {task}: the second scorer died while it computed this reward: scorer-[01] died"
        assert re.search(
            rf"rl: dropped group 0/{task}: {died} \(.*\): {cause} \(row .*\) \(weights version \d\)", said
        ), said
        # The scripted oracle, before the stage, has met it as well.
        assert re.search(rf"stream {task}: the second scorer died .*\. It counts as failed", said), said
    skipped = json.loads((root / "stages" / "rl.json").read_text())["result"]["skipped"]
    assert sorted(sample["source"] for sample in skipped) == [
        f"stream 0/{task}/{i}" for task in (DIES, HANGS) for i in (0, 1)
    ]
    assert "Traceback" not in said

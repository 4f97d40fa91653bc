"""An RL stage that ends early, as its reward is high enough: a real driver and actors, a rerun, and one that asks for more."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from runtime.store.checkpoint import verify
from tests.support.killed_runs import EVERY_GROUP_ONCE, STEPS, Driver, journal, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENDS = ("algorithm.stop_when=0.01", "algorithm.stop_steps=2")


def test_a_stage_ends_early_is_finished_and_trains_on_only_when_asked_for_more(tmp_path):
    root = tmp_path / "run"

    def finish(*overrides):
        driver = Driver(root, *overrides)
        assert driver.wait() == 0, driver.output
        return driver.output, json.loads((root / "stages" / "rl.json").read_text())

    said, manifest = finish(*ENDS)
    result = manifest["result"]
    end = result["steps"]
    assert 2 <= end < STEPS, "the noise in the reward is worth more than that"
    assert (
        f"rl: ends with step {end} of {STEPS}: the mean reward of the last 2 steps is {result['saturated_at']:.3f}"
        in said
    )
    assert manifest["status"] == "finished"
    assert verify(root / "checkpoints" / "rl" / "final").state.step == end
    # The last step is evaluated, whatever its number.
    lines = journal(root, "rl")
    assert [line["step"] for line in lines if line["kind"] == "eval"][-1] == end
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, end + 1))

    said, again = finish(*ENDS, "resume=auto")
    assert again["result"] == result
    assert f"rl {end}/" not in said
    # More steps than it did not need do not make it train on, either.
    said, again = finish(*ENDS, "resume=auto", f"algorithm.steps={STEPS + 2}")
    assert again["result"] == result

    _, more = finish("resume=auto")
    assert (more["result"]["steps"], more["result"]["saturated_at"]) == (STEPS, None)
    counts = trained(root, "rl")
    assert set(counts.values()) == {1}, "groups that were under way when it ended early are trained now, and none twice"
    assert Counter(group.split("/")[0] for group in counts) == EVERY_GROUP_ONCE

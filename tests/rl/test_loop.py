"""The RL loop's own bookkeeping around evaluations: what is kept as the best, what is named as left out."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from rl import loop
from rl.loop import RLLoop
from rl.results import RLResult
from runtime.store.checkpoint import CheckpointState, commit, partial_path
from runtime.store.journal import StepJournal

pytestmark = pytest.mark.smoke


@pytest.fixture
def standing(tmp_path):
    """What the loop's methods read of it, at step 6 after evaluations of 2 and 6; `said` is what it told."""
    journal = StepJournal.open(tmp_path / "rl.steps.jsonl", 0)
    for step in range(1, 7):
        journal.append(step, {"train/loss": 0.5}, (f"0/{step}",))
    for step in (2, 6):
        journal.append(step, {"eval/reward": step / 8}, kind="eval")
    partial = partial_path(tmp_path / "step000006")
    (partial / "hf").mkdir()
    (partial / "hf" / "model.bin").write_text("weights")
    commit(partial, tmp_path / "step000006", CheckpointState("rl", 6, 6, ()))
    said: list[str] = []
    return SimpleNamespace(
        config=SimpleNamespace(eval=SimpleNamespace(best="reward")),
        version=6,
        total=12,
        journal=journal,
        result=RLResult(),
        evaluation=SimpleNamespace(due=lambda step: step % 2 == 0),
        checkpoints=SimpleNamespace(folder=tmp_path),
        progress=SimpleNamespace(say=said.append),
        _written={6},
        said=said,
    )


def test_a_full_disk_costs_the_best_checkpoint_and_not_the_run(standing, monkeypatch):
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(loop, "promote", full)
        RLLoop._promote(standing, 6)
    assert standing.result.best == {}, "the next one must not have to beat what is not there"
    assert "could not be kept" in standing.said[0]
    RLLoop._promote(standing, 6)
    assert standing.result.best["step"] == 6
    assert (standing.checkpoints.folder / "best" / "hf" / "model.bin").read_text() == "weights"


def test_an_evaluation_that_a_kill_cut_off_is_named(standing):
    RLLoop._name_cut_off(standing)
    assert len(standing.said) == 1
    assert "evaluation of step 4 was cut off" in standing.said[0]

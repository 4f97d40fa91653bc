"""The RL stage's own bookkeeping around evaluations: what is kept as the best, what is named as left out."""

from __future__ import annotations

import errno

import pytest

from rl import evaluated_stage
from rl.evaluated_stage import EvaluatedStage
from runtime.store.checkpoint import CheckpointState, commit, partial_path
from runtime.store.journal import StepJournal, journal_path
from tests.support.configs import composed
from tests.support.stage import stage_context
from tests.support.tasks import clip_task


@pytest.fixture
def standing(tmp_path):
    """A stage that goes on from step 6 of 12, after evaluations of 2 and 6; `said` is what it told."""
    config = composed(f"run_root={tmp_path}", "eval.every=2", "eval.best=reward")
    journal = StepJournal.open(journal_path(tmp_path, "rl"), 0)
    for step in range(1, 7):
        journal.append(step, {"train/loss": 0.5}, (f"0/{step}",))
    for step in (2, 6):
        journal.append(step, {"eval/reward": step / 8}, kind="eval")
    folder = tmp_path / "checkpoints" / "rl"
    folder.mkdir(parents=True)
    partial = partial_path(folder / "step000006")
    (partial / "hf").mkdir()
    (partial / "hf" / "model.bin").write_text("weights")
    state = CheckpointState("rl", 6, 6)
    commit(partial, folder / "step000006", state)
    context, told = stage_context(config, "rl", steps=12, resume=state)
    stage = EvaluatedStage(context, (), (clip_task("a"),), patience=50, group_size=2)
    stage.said = told.said
    return stage


def test_a_full_disk_costs_the_best_checkpoint_and_not_the_run(standing, monkeypatch):
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(evaluated_stage, "promote", full)
        standing.completed(6)
    assert standing.best == {}, "the next one must not have to beat what is not there"
    assert "could not be kept" in standing.said[0]
    standing.completed(6)
    assert standing.best["step"] == 6
    assert (standing.checkpoints.folder / "best" / "hf" / "model.bin").read_text() == "weights"


def test_an_evaluation_that_a_kill_cut_off_is_named(standing):
    standing.catch_up()
    assert len(standing.said) == 1
    assert "evaluation of step 4 was cut off" in standing.said[0]


def test_a_checkpoint_whose_evaluation_is_still_to_come_outlives_newer_ones(standing):
    standing.checkpoints.written |= {8, 9}
    assert standing.completed(9) == {"step000008"}
    standing.journal.append(8, {"eval/reward": 0.1}, kind="eval")
    assert standing.completed(9) == set()


def test_evaluations_are_due_by_the_schedule_and_after_the_last_step(standing):
    assert [step for step in range(1, 13) if standing.evaluation_due(step)] == [2, 4, 6, 8, 10, 12]
    assert not standing.evaluation_missing(), "that of step 6 is in the journal"
    standing.heldout = ()
    assert not standing.evaluation_due(2)


def test_a_checkpoint_that_was_completed_when_nobody_looked_may_still_be_the_best(standing):
    assert standing.best == {}
    standing.catch_up()
    assert (standing.best["step"], standing.best["value"]) == (6, 0.75)

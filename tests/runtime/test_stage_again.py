"""A stage that loses its learner is planned anew: from where it stood, if it had not got to training."""

from __future__ import annotations

import pytest

from runtime.run import _reached
from runtime.store.journal import StepJournal, journal_path
from tests.support.stages import begun, checkpoint, config, store, with_data

pytestmark = pytest.mark.smoke


@pytest.fixture
def going_on(tmp_path):
    """A store whose RL stage, finished before, goes on from its step 4, though there are 8 and a last one."""
    run = config(tmp_path)
    with_data(tmp_path)
    begun(run, "data", train="x")
    begun(run, "sft", steps=2)
    begun(run, "rl", steps=12)
    fourth = checkpoint(tmp_path, "rl", 4)
    checkpoint(tmp_path, "rl", 8)
    checkpoint(tmp_path, "rl", 12, "final")
    found = store(config(tmp_path, resume=str(fourth)))
    found.plan()
    found.begin("rl")
    return found


def test_before_anything_was_set_aside_the_plan_stays_as_it_was(going_on):
    plan = going_on.again("rl")
    assert (plan.step, plan.skip, plan.fresh, plan.attempt) == (4, False, False, going_on.plans["rl"].attempt)
    assert _reached(going_on, "rl") == 4, "the journal on disk is of the run that finished"


def test_once_it_trains_the_newest_checkpoint_counts(going_on, tmp_path):
    going_on.settle("rl")
    assert going_on.again("rl").step == 4, "8 and the last one were set aside"
    newest = checkpoint(tmp_path, "rl", 6)
    plan = going_on.again("rl")
    assert (plan.resume.path, plan.fresh) == (newest, False)


def test_how_far_a_stage_has_come_is_told_by_its_steps_and_not_by_a_late_evaluation(going_on, tmp_path):
    going_on.settle("rl")
    journal = StepJournal.open(journal_path(tmp_path, "rl"), 0)
    for step, kind in ((5, "step"), (6, "step"), (4, "eval")):
        journal.append(step, {}, kind=kind)
    assert _reached(going_on, "rl") == 6
    assert _reached(going_on, "eval") == 0


def test_a_stage_without_a_checkpoint_starts_afresh(tmp_path):
    run = config(tmp_path)
    with_data(tmp_path)
    begun(run, "data", train="x")
    found = store(run)
    found.plan()
    found.begin("sft")
    plan = found.again("sft")
    assert (plan.step, plan.resume, plan.fresh, plan.attempt) == (0, None, True, 2)

"""The journal tells one history, whatever a crash cut off, and hands every step to the charts once."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.store.journal import StepJournal

pytestmark = pytest.mark.smoke


def fill(journal, first, last, evals=()):
    for step in range(first, last + 1):
        journal.append(step, {"loss": step / 3, "nothing": None}, (f"0/{step}",))
        if step in evals:
            journal.append(step, {"eval/reward": 1.0}, kind="eval")


def test_it_comes_back_exactly_as_it_was_written(tmp_path):
    journal = StepJournal.open(tmp_path / "rl.steps.jsonl", 0)
    fill(journal, 1, 5, evals=(2,))
    again = StepJournal.open(tmp_path / "rl.steps.jsonl", 5)
    assert again.take(5) == journal.take(5)
    assert again.evaluation(2) == {"eval/reward": 1.0}
    assert again.evaluation(3) is None
    assert [line.step for line in again.steps()] == [1, 2, 3, 4, 5]


def test_a_stage_that_starts_over_begins_an_empty_journal(tmp_path):
    fill(StepJournal.open(tmp_path / "j", 0), 1, 3)
    assert StepJournal.open(tmp_path / "j", 0).take(99) == []
    assert (tmp_path / "j").read_text() == ""


@settings(max_examples=60, deadline=None)
@given(
    crashes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=4),
    every=st.integers(1, 4),
)
def test_after_any_crashes_every_step_is_there_once_and_charted_once(crashes, every):
    """A stage of 12 steps checkpoints every few, and dies after some step with some bytes of the next line written."""
    with tempfile.TemporaryDirectory() as folder:
        path, charted, saved = Path(folder) / "j", [], 0
        for dies_after, torn in [*crashes, (12, 0)]:
            journal = StepJournal.open(path, saved)
            charted += [line.step for line in journal.take(saved) if line.step not in charted]
            for step in range(saved + 1, dies_after + 1):
                fill(journal, step, step)
                if step % every == 0 or step == 12:
                    saved = step
                    charted += [line.step for line in journal.take(step)]
            if torn and dies_after < 12:
                with path.open("a") as file:
                    file.write('{"step": 99, "kind": "step", "values": {"loss": 1.0}, "x": "'[:torn])
        lines = StepJournal.open(path, 12).take(12)
        assert [line.step for line in lines] == list(range(1, 13))
        assert charted == list(range(1, 13))


def test_an_evaluation_that_ends_later_waits_for_a_checkpoint_of_the_steps_before_it(tmp_path):
    journal = StepJournal.open(tmp_path / "j", 0)
    fill(journal, 1, 3)
    journal.append(2, {"eval/reward": 0.5}, kind="eval")
    assert [line.step for line in journal.take(2)] == [1, 2]
    assert [(line.step, line.kind) for line in journal.take(3)] == [(3, "step"), (2, "eval")]
    assert journal.take(3) == []


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-300, -0.0, 123456789.123456789])
def test_losses_survive_bit_for_bit(tmp_path, value):
    StepJournal.open(tmp_path / "j", 0).append(1, {"loss": value})
    (line,) = StepJournal.open(tmp_path / "j", 1).take(1)
    assert line.values["loss"].hex() == value.hex()


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, caplog):
    path = tmp_path / "j"
    journal = StepJournal.open(path, 0)
    fill(journal, 1, 2)
    path.rename(tmp_path / "saved")
    path.mkdir()  # nothing can be appended to a folder, as to a file on a full disk
    fill(journal, 3, 5)
    assert caplog.text.count("cannot be written, training goes on") == 1
    path.rmdir()
    (tmp_path / "saved").rename(path)
    fill(journal, 6, 6)
    assert [line.step for line in StepJournal.open(path, 6).take(6)] == [1, 2, 3, 4, 5, 6]


def test_what_was_written_and_taken_is_in_the_file_only(tmp_path):
    journal = StepJournal.open(tmp_path / "j", 0)
    fill(journal, 1, 20, evals=(10,))
    journal.take(20)
    tracemalloc.start()
    try:
        for step in range(21, 2001):
            fill(journal, step, step)
            journal.take(step)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 50_000
    assert [line.step for line in journal.steps()] == list(range(1, 2001))
    assert journal.evaluation(10) == {"eval/reward": 1.0}


def test_a_line_that_was_cut_off_on_a_full_disk_is_written_whole(tmp_path):
    path = tmp_path / "j"
    journal = StepJournal.open(path, 0)
    fill(journal, 1, 2)
    path.rename(tmp_path / "saved")
    path.mkdir()
    fill(journal, 3, 3)
    path.rmdir()
    (tmp_path / "saved").rename(path)
    with path.open("a") as file:
        file.write('{"step": 3, "ki')
    assert [line.step for line in journal.steps()] == [1, 2, 3]
    fill(journal, 4, 4)
    assert [line.step for line in StepJournal.open(path, 4).take(4)] == [1, 2, 3, 4]

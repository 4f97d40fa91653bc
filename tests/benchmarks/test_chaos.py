"""benchmarks.chaos sees what it looks for: groups that are lost or done twice, and inputs that end unclearly."""

from __future__ import annotations

import json

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import inputs, subject
from benchmarks.chaos.subject import BATCH, STEPS, Subject
from streams.data.dataset import TaskFile
from tests.support.killed_runs import CLIPS

TASKS = [f"train-{i}" for i in range(CLIPS)]


def finished(root, stage: str, change=lambda groups: groups) -> None:
    """What a run that has trained everything once has left of a stage, but for `change` of its groups."""
    groups = [f"{epoch}/{task}" for epoch in range(BATCH * STEPS[stage] // CLIPS) for task in TASKS]
    groups = change(groups)
    folder = root / "checkpoints" / stage / "final"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"stage": stage, "version": 1, "step": 1, "consumed": groups}))
    lines = [
        {"step": step + 1, "kind": "step", "values": {}, "groups": groups[step * BATCH : (step + 1) * BATCH]}
        for step in range(STEPS[stage])
    ]
    (root / "stages").mkdir(exist_ok=True)
    (root / "stages" / f"{stage}.steps.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A subject without a driver, and the metrics that its charts have."""
    charted = {"sft/loss": list(range(1, STEPS["sft"] + 1)), "train/loss": list(range(1, STEPS["rl"] + 1))}
    monkeypatch.setattr(Subject, "start", lambda self: None)
    monkeypatch.setattr(subject, "charts", lambda root: (1, charted))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"id": task}) for task in TASKS))
    return Subject(tmp_path), charted


def test_a_run_that_did_everything_once_has_lost_nothing(run):
    for stage in STEPS:
        finished(run[0].root, stage)
    assert run[0].audit() == ([], [])


def test_a_group_instead_of_another_is_one_lost_and_one_done_twice(run):
    finished(run[0].root, "sft")
    finished(run[0].root, "rl", lambda groups: [*groups[:-1], groups[0]])
    last = f"{BATCH * STEPS['rl'] // CLIPS - 1}/{TASKS[-1]}"
    assert run[0].audit() == ([f"rl group {last}"], [f"rl group 0/{TASKS[0]}"])


def test_a_step_that_the_charts_lack_or_have_twice_is_seen(run):
    for stage in STEPS:
        finished(run[0].root, stage)
    run[1]["sft/loss"].remove(3)
    run[1]["train/loss"].append(7)
    assert run[0].audit() == (["sft/loss of step 3"], ["train/loss of step 7"])


def test_malformed_inputs_end_clearly(tmp_path):
    assert inputs.try_inputs(80, 4, tmp_path) == [""] * 80


@pytest.mark.parametrize(
    ("name", "planted", "said"),
    [
        ("load_tasks", TypeError("unhashable"), "TypeError: unhashable"),
        ("load_tasks", ValueError("bad row"), "does not name"),
        ("verify", OSError("no"), "OSError: no"),
        ("composed", ValueError("must be positive"), "does not name"),
    ],
)
def test_an_input_that_ends_unclearly_is_seen(tmp_path, monkeypatch, name, planted, said):
    whole, calls = getattr(inputs, name), []

    def broken(*given, **named):
        # The first call of each sort makes the sound one.
        calls.append(given)
        if len(calls) == 1 and name != "verify":
            return whole(*given, **named)
        raise planted

    monkeypatch.setattr(inputs, name, broken)
    unclear = [found for found in inputs.try_inputs(8, 4, tmp_path) if found]
    assert len(unclear) == 2
    assert all(said in found for found in unclear), unclear


def test_a_row_that_vanishes_without_a_word_is_seen(tmp_path, monkeypatch):
    whole = inputs.load_tasks

    def forgetful(path, **named):
        found = whole(path, **named)
        return TaskFile(found.tasks[:1], ())

    monkeypatch.setattr(inputs, "load_tasks", forgetful)
    assert any("lines, but" in found for found in inputs.try_inputs(8, 4, tmp_path))


def test_a_checkpoint_that_passes_for_sound_is_seen(tmp_path, monkeypatch):
    whole = inputs.verify
    sound = []

    def trusting(path):
        try:
            return sound[0] if sound else whole(path)
        except (ValueError, OSError):
            from types import SimpleNamespace

            return SimpleNamespace(state=None)

    monkeypatch.setattr(inputs, "verify", trusting)
    assert any("it passes for sound" in found for found in inputs.try_inputs(8, 4, tmp_path))


def test_what_was_found_decides_the_exit_status_and_a_later_call_goes_on_from_it(tmp_path):
    found = chaos.Found(seed=3, hits=[{"kind": "worker", "at": "rl 2", "recovered_s": 4.0}])
    assert found.good
    row = found.row()
    assert (row["kills"], row["by_kind"], row["recovered_s_p50"], row["recovered_s_max"]) == (
        1,
        {"worker": 1},
        4.0,
        4.0,
    )
    file = tmp_path / "chaos.json"
    file.write_text(json.dumps(row))
    assert chaos._before(str(file), 3) == found
    assert chaos._before(str(file), 4) == chaos.Found(4)
    for wrong in ({"lost": ["x"]}, {"hung": ["x"]}, {"leaked": ["x"]}, {"bit_equal": False}, {"inputs": 3}):
        assert not chaos.Found(3, **wrong).good

"""Checkpoints: what a crash leaves behind is never taken for a complete one, and damage is named."""

from __future__ import annotations

import json
import os

import pytest

from runtime.store.checkpoint import (
    OPTIMIZER_FOLDER,
    STATE_FILE,
    CheckpointState,
    Groups,
    by_age,
    commit,
    newest_usable,
    partial_path,
    promote,
    prune,
    read_best,
    read_state,
    set_aside_after,
    verify,
)
from tests.support.stage import named

pytestmark = pytest.mark.smoke


def state(step=1, consumed=("0/a", "0/b")):
    return CheckpointState("rl", step, step, named(*consumed))


def write(final, step, content="weights"):
    """A checkpoint as a stage writes it."""
    partial = partial_path(final)
    (partial / "hf").mkdir()
    (partial / "hf" / "model.bin").write_text(content)
    (partial / OPTIMIZER_FOLDER).mkdir()
    (partial / OPTIMIZER_FOLDER / "moments.pt").write_text("moments")
    commit(partial, final, state(step))
    return final


def latest(folder, say=lambda text: None):
    found = newest_usable(folder, say)
    return found.path if found else None


def test_a_committed_checkpoint_has_its_content_and_its_state_and_no_leftovers(tmp_path):
    final = write(tmp_path / "rl" / "final", 3)
    assert (final / "hf" / "model.bin").read_text() == "weights"
    assert read_state(final) == state(3)
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_nothing_stands_under_the_final_name_before_the_commit(tmp_path):
    final = tmp_path / "final"
    partial = partial_path(final)
    (partial / "model.bin").write_text("half")
    assert partial.parent == final.parent, "on the same file system, so that the rename is atomic"
    assert not final.exists()
    assert latest(tmp_path) is None


def test_what_a_crash_left_behind_is_never_taken_for_complete(tmp_path):
    complete = write(tmp_path / "step000002", 2)
    left = write(tmp_path / "aside", 9).rename(tmp_path / "step000009.partial")
    write(tmp_path / "aside", 8).rename(tmp_path / "step000002.replaced")
    assert (left / STATE_FILE).is_file()
    assert latest(tmp_path) == complete
    assert read_state(complete).step == 2


@pytest.mark.parametrize("survived", [0, 1])
def test_a_crash_between_the_renames_of_a_commit_leaves_nothing_half_made_and_the_next_commit_succeeds(
    tmp_path, monkeypatch, survived
):
    final = write(tmp_path / "final", 1, "old")
    rename, calls = os.rename, []

    def crash(source, target):
        calls.append(source)
        if len(calls) > survived:
            raise OSError("power cut")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(OSError, match="power cut"):
            write(final, 2, "new")
    assert len(calls) == survived + 1
    if final.exists():
        assert read_state(final) == state(1)
        assert (final / "hf" / "model.bin").read_text() == "old"
    assert latest(tmp_path) == final, "the older one is back"
    write(final, 3, "newer")
    assert read_state(final) == state(3)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_commit_replaces_an_older_checkpoint_of_the_same_name_entirely(tmp_path):
    final = write(tmp_path / "final", 1, "old")
    (final / "only_in_the_old_one").write_text("x")
    write(final, 2, "new")
    assert read_state(final).step == 2
    assert (final / "hf" / "model.bin").read_text() == "new"
    assert not (final / "only_in_the_old_one").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_leftovers_of_an_earlier_crash_do_not_get_into_the_next_checkpoint(tmp_path):
    final = tmp_path / "final"
    (partial_path(final) / "stale.bin").write_text("from a crashed run")
    write(final, 1)
    assert not (final / "stale.bin").exists()


def test_a_commit_clears_an_older_checkpoint_that_a_crash_left_set_aside(tmp_path):
    final = write(tmp_path / "final", 1).rename(tmp_path / "final.replaced").with_name("final")
    write(final, 2)
    assert read_state(final).step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_commit_succeeds_after_a_crash_that_came_before_the_older_one_was_deleted(tmp_path):
    final = write(tmp_path / "final", 2)
    write(tmp_path / "aside", 1).rename(tmp_path / "final.replaced")
    write(final, 3)
    assert read_state(final).step == 3


def test_latest_takes_the_most_steps_whatever_names_and_dates_say(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    for name, step in (("zzz", 10), ("final", 200), ("step000030", 30)):
        write(tmp_path / name, step)
    os.utime(tmp_path / "zzz" / STATE_FILE, (2e9, 2e9))
    (tmp_path / "without_state").mkdir()
    assert latest(tmp_path) == tmp_path / "final"


def test_a_folder_without_state_is_not_a_complete_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a complete checkpoint: it has no {STATE_FILE}"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"stage": "rl", "version": 1, "step": 1}',
        '{"stage": "rl", "step": 1, "consumed": []}',
        '{"stage": "rl", "version": 1, "step": 1, "consumed": null}',
        '{"stage": "rl", "version": 1, "step": 1, "consumed": [], "what": 2}',
        '{"stage": "rl", "version": 1, "step": "1", "consumed": []}',
        '{"stage": "rl", "version": null, "step": 1, "consumed": []}',
        '{"stage": "rl", "version": 1, "step": 1, "consumed": [], "rows": [1]}',
        '{"stage": "rl", "version": 1, "step": 1, "consumed": [], "settings": []}',
        "[" * 200_000,
    ],
)
def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path, content):
    file = tmp_path / STATE_FILE
    file.write_text(content)
    with pytest.raises(ValueError, match="is damaged") as caught:
        read_state(tmp_path)
    assert str(file) in str(caught.value)


def test_a_state_of_random_bytes_is_an_error_that_names_the_file(tmp_path):
    file = tmp_path / STATE_FILE
    file.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_state(tmp_path)
    assert str(file) in str(caught.value)


# ---- damage ----


def damaged(path, how):
    file = path / "hf" / "model.bin"
    if how == "flipped":
        file.write_text("weighty"[: len("weights")])
    elif how == "truncated":
        file.write_text("weig")
    elif how == "missing":
        file.unlink()
    elif how == "listing":
        (path / "files.json").write_text("{")
    elif how == "empty listing":
        (path / "files.json").write_text("{}")
    elif how == "endless size":
        (path / "files.json").write_text('{"state.json": [1e999, 0]}')
    elif how == "nested listing":
        (path / "files.json").write_text("[" * 200_000)
    elif how == "no number":
        (path / STATE_FILE).write_text('{"stage": "rl", "version": 1, "step": "9", "consumed": []}')
    elif how == "no listing":
        (path / "files.json").unlink()
    else:
        (path / STATE_FILE).write_text("{}")


@pytest.mark.parametrize(
    "how",
    [
        *(
            "flipped",
            "truncated",
            "missing",
            "listing",
            "empty listing",
            "endless size",
            "nested listing",
            "no listing",
        ),
        *("state", "no number"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    before = write(tmp_path / "step000002", 2)
    newest = write(tmp_path / "step000004", 4)
    said = []
    assert latest(tmp_path, said.append) == newest
    assert said == []
    damaged(newest, how)
    assert latest(tmp_path, said.append) == before
    (words,) = said
    assert str(newest) in words
    assert "trying the one before" in words


def test_a_checkpoint_that_was_not_finished_is_named(tmp_path):
    complete = write(tmp_path / "step000002", 2)
    partial_path(tmp_path / "step000004")
    said = []
    assert latest(tmp_path, said.append) == complete
    assert len(said) == 1
    assert "step000004.partial" in said[0]
    assert "was not finished" in said[0]


def test_when_every_checkpoint_is_damaged_none_is_used_and_each_is_named(tmp_path):
    for step in (1, 2, 3):
        damaged(write(tmp_path / f"step{step:06d}", step), "truncated")
    said = []
    assert latest(tmp_path, said.append) is None
    assert len(said) == 3


# ---- what is kept ----


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept_and_those_in_use_are_protected(tmp_path, keep):
    for step in range(1, 5):
        write(tmp_path / f"step{step:06d}", step)
    prune(tmp_path, keep, "all", protect={"step000001"})
    left = [path.name for path in by_age(tmp_path)]
    expected = [f"step{step:06d}" for step in range(4, max(0, 4 - keep), -1)]
    assert left == list(dict.fromkeys([*expected, "step000001"]))
    assert all((tmp_path / name / OPTIMIZER_FOLDER).is_dir() for name in left)


def test_only_the_latest_keeps_its_optimiser_and_the_others_stay_usable(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / f"step{step:06d}", step)
    prune(tmp_path, 3, "latest")
    found = [verify(path) for path in by_age(tmp_path)]
    assert [(f.state.step, f.resumable) for f in found] == [(3, True), (2, False), (1, False)]


def test_the_best_and_what_is_aside_do_not_count_as_checkpoints(tmp_path):
    source = write(tmp_path / "step000002", 2)
    promote(source, tmp_path / "best", {"step": 2, "metric": "reward", "value": 0.5})
    assert by_age(tmp_path) == [source]
    assert (tmp_path / "best" / "hf" / "model.bin").read_text() == "weights"
    assert not (tmp_path / "best" / OPTIMIZER_FOLDER).exists()
    assert read_best(tmp_path / "best", 2)["value"] == 0.5
    assert read_best(tmp_path / "best", 1) == {}, "of a step that was undone"
    prune(tmp_path, 1, "all")
    assert (tmp_path / "best" / "hf").is_dir()
    write(tmp_path / "step000004", 4, "better")
    promote(tmp_path / "step000004", tmp_path / "best", {"step": 4, "metric": "reward", "value": 0.75})
    assert (tmp_path / "best" / "hf" / "model.bin").read_text() == "better"
    assert (tmp_path / "step000004" / "hf" / "model.bin").read_text() == "better"


def test_going_back_to_a_step_sets_later_checkpoints_aside_instead_of_deleting_them(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path / f"step{step:06d}", step)
    (tmp_path / "step000006" / STATE_FILE).write_text("{")
    assert sorted(set_aside_after(tmp_path, 2)) == ["step000004.undone", "step000006.undone"]
    assert latest(tmp_path) == tmp_path / "step000002"
    assert (tmp_path / "step000006.undone" / "hf").is_dir()


def test_an_optimiser_state_that_was_being_dropped_does_not_count(tmp_path):
    final = write(tmp_path / "step000002", 2)
    assert verify(final).resumable
    listing = final / "files.json"
    names = json.loads(listing.read_text())
    listing.write_text(json.dumps({k: v for k, v in names.items() if not k.startswith(OPTIMIZER_FOLDER)}))
    assert not verify(final).resumable, "what is still there is not checked"


def test_a_damaged_note_of_the_best_is_named(tmp_path):
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(ValueError, match=r"best\.json is damaged"):
        read_best(tmp_path, 2)


def test_the_state_comes_back_as_it_was_written(tmp_path):
    partial = partial_path(tmp_path / "final")
    full = CheckpointState(
        *("rl", 7, 7, Groups(((0, 3), (5, 6)), ("0/gone",)), Groups(((4, 4),)), ("a", "b"), 9, 4),
        *({"max_age": 2, "skipped": []}, "run"),
    )
    commit(partial, tmp_path / "final", full)
    assert read_state(tmp_path / "final") == full
    assert json.loads((tmp_path / "final" / "files.json").read_text()).keys() == {STATE_FILE}

"""Checkpoints: what a crash leaves behind is never taken for a complete one, and damage is named."""

from __future__ import annotations

import os

import pytest

from rl.checkpoint import STATE_FILE, CheckpointState, commit, latest, partial_path, read_state


def state(step=1, consumed=("0/a", "0/b")):
    return CheckpointState("rl", step, step, tuple(consumed))


def write(final, step, content="weights"):
    """A checkpoint as a stage writes it."""
    partial = partial_path(final)
    (partial / "hf").mkdir()
    (partial / "hf" / "model.bin").write_text(content)
    commit(partial, final, state(step))
    return final


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


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_what_a_crash_left_behind_is_never_taken_for_complete(tmp_path, suffix):
    complete = write(tmp_path / "step000002", 2)
    left = write(tmp_path / "aside", 9).rename(tmp_path / f"step000009{suffix}")
    assert (left / STATE_FILE).is_file()
    assert latest(tmp_path) == complete


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
    assert latest(tmp_path) == (final if survived == 0 else None)
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

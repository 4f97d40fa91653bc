"""Resuming: what is skipped, what goes on, what is refused, decided before any actor starts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil

import pytest

from conf.schema import MemoryConfig
from conf.training import AlgorithmConfig, SftConfig
from runtime.starting_point import StartingPoint, reference_of_branch
from runtime.store.checkpoint import (
    OPTIMIZER_FOLDER,
    by_age,
    newest_usable,
    prune,
)
from runtime.store.manifests import StageStore, clear, settings
from streams.support.files import digest
from tests.support.stages import begun, checkpoint, config, store, with_data

pytestmark = pytest.mark.smoke


def test_in_an_empty_folder_every_stage_starts(tmp_path):
    plans = store(config(tmp_path)).plan()
    assert [(p.stage, p.skip, p.resume, p.attempt, p.fresh) for p in plans.values()] == [
        (stage, False, None, 1, True) for stage in ("data", "sft", "rl")
    ]


def test_finished_stages_are_skipped_and_the_interrupted_one_goes_on(tmp_path):
    run = config(tmp_path)
    with_data(tmp_path)
    begun(run, "data", train="x")
    begun(run, "sft", steps=60)
    begun(run, "rl")
    newest = checkpoint(tmp_path, "rl", 4)
    checkpoint(tmp_path, "rl", 2)
    said = []
    plans = store(run, said).plan()
    assert plans["data"].skip
    assert plans["sft"].skip
    assert plans["rl"].resume.path == newest
    assert (plans["rl"].step, plans["rl"].attempt, plans["rl"].fresh) == (4, 2, False)
    assert any(f"going on from {newest}" in line for line in said)


def test_data_that_were_deleted_are_made_again(tmp_path):
    run = config(tmp_path)
    with_data(tmp_path)
    begun(run, "data", train="x")
    (tmp_path / "data" / "train.jsonl").unlink()
    assert not store(run).plan()["data"].skip


def test_never_starts_over_whatever_is_there(tmp_path):
    begun(config(tmp_path), "sft", steps=60)
    plans = store(config(tmp_path, resume="never", seed=9)).plan()
    assert all(plan.fresh and not plan.skip for plan in plans.values())


def test_a_stage_that_began_and_has_no_checkpoint_starts_as_another_attempt(tmp_path):
    begun(config(tmp_path), "sft")
    assert store(config(tmp_path)).plan()["sft"].attempt == 2
    assert store(config(tmp_path)).plan()["sft"].fresh


def test_when_all_checkpoints_are_damaged_it_is_said_and_nothing_is_started(tmp_path):
    begun(config(tmp_path), "sft")
    path = checkpoint(tmp_path, "sft", 3)
    (path / OPTIMIZER_FOLDER / "state.pt").write_text("stale")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* can be used"):
        store(config(tmp_path)).plan()
    assert path.is_dir()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed=1, began with 0"),
        ({"memory": MemoryConfig("rcsm", 3)}, "memory.name='rcsm', began with 'full'"),
        ({"sft": SftConfig(batch=4)}, "sft.batch=4, began with 16"),
        ({"sft": SftConfig(steps=30)}, "sft.steps=30, began with 60"),
        ({"sft": SftConfig(learner={"lr": 0.1})}, "sft.learner.lr=0.1, began with None"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_both_values(tmp_path, changes, key, finished):
    begun(config(tmp_path, stages=("sft",)), "sft", **({"steps": 60} if finished else {}))
    checkpoint(tmp_path, "sft", 60 if finished else 20)
    if "memory" in changes:
        run = dataclasses.replace(config(tmp_path, stages=("sft",)), **changes)
    else:
        run = config(tmp_path, stages=("sft",), **changes)
    with pytest.raises(ValueError, match="began with other settings") as caught:
        store(run).plan()
    assert key in str(caught.value)
    assert "resume=never" in str(caught.value)


def test_settings_that_only_change_how_a_stage_runs_may_change(tmp_path):
    run = config(tmp_path, stages=("sft",))
    begun(run, "sft", steps=60)
    checkpoint(tmp_path, "sft", 60, "final")
    other = dataclasses.replace(
        run,
        rollout=dataclasses.replace(run.rollout, workers=5),
        learner=dataclasses.replace(run.learner, threads=3, row_tokens=99),
        data=dataclasses.replace(run.data, cache_mb=1),
        algorithm=AlgorithmConfig(steps=999),
    )
    assert store(other).plan()["sft"].skip


def test_a_finished_stage_with_more_steps_goes_on_from_its_last_checkpoint(tmp_path):
    before = config(tmp_path, stages=("rl",), algorithm=AlgorithmConfig(steps=4))
    begun(before, "rl", steps=4)
    final = checkpoint(tmp_path, "rl", 4, "final")
    said = []
    plan = store(config(tmp_path, stages=("rl",), algorithm=AlgorithmConfig(steps=9)), said).plan()["rl"]
    assert plan.resume.path == final
    assert any("algorithm.steps grows from 4 to 9" in line for line in said)


def test_data_that_changed_under_a_run_are_refused(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("one\n")
    base = config(tmp_path / "run", stages=("sft",))
    run = dataclasses.replace(base, data=dataclasses.replace(base.data, train=str(train), heldout=str(train)))
    begun(run, "sft")
    checkpoint(run.root, "sft", 3)
    assert store(run).plan()["sft"].attempt == 2
    train.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"data\.train \(content\)"):
        store(run).plan()


def test_what_is_recorded_is_what_was_read_whatever_becomes_of_the_file(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("one\n")
    base = config(tmp_path / "run", stages=("sft",))
    run = dataclasses.replace(base, data=dataclasses.replace(base.data, train=str(train), heldout=str(train)))
    read = digest(train)
    stages = StageStore(run.root, run, print, read)
    stages.plan()
    train.unlink()
    stages.begin("sft")
    assert stages.read("sft")["settings"]["data.train (content)"] == read
    checkpoint(run.root, "sft", 3, settings=stages.settings("sft"))
    train.write_text("two\n")
    with pytest.raises(ValueError, match=r"data\.train \(content\)"):
        store(run).plan()
    train.write_text("one\n")
    assert store(run).plan()["sft"].attempt == 2


def test_auto_never_replaces_a_later_stage_that_was_made_without_this_one(tmp_path):
    begun(config(tmp_path, stages=("rl",)), "rl", steps=40)
    with pytest.raises(ValueError, match="holds stage rl but not sft"):
        store(config(tmp_path, stages=("sft",))).plan()


def test_a_damaged_manifest_is_named(tmp_path):
    begun(config(tmp_path), "sft")
    (tmp_path / "stages" / "sft.json").write_text("{")
    with pytest.raises(ValueError, match=r"stages/sft\.json is damaged"):
        store(config(tmp_path)).plan()


# ---- resume=PATH ----


def test_a_path_skips_earlier_stages_and_goes_on_from_there_in_a_new_folder(tmp_path):
    path = checkpoint(tmp_path / "old", "rl", 4)
    plans = store(config(tmp_path / "new", resume=str(path))).plan()
    assert plans["sft"].skip
    assert plans["rl"].resume.path == path
    assert plans["rl"].step == 4


def test_going_back_to_an_earlier_checkpoint_of_the_same_run_sets_later_ones_aside(tmp_path):
    begun(config(tmp_path), "rl")
    early = checkpoint(tmp_path, "rl", 2)
    checkpoint(tmp_path, "rl", 4)
    said = []
    back = store(config(tmp_path, resume=str(early)), said)
    plan = back.plan()["rl"]
    assert (plan.step, plan.attempt) == (2, 2)
    assert (tmp_path / "checkpoints" / "rl" / "step000004").is_dir(), "a plan may still come to nothing"
    back.begin("rl")
    back.settle("rl")
    assert (tmp_path / "checkpoints" / "rl" / "step000004.undone").is_dir()
    assert any("set aside" in line for line in said)


def test_a_path_that_is_no_checkpoint_or_of_a_stage_that_does_not_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume=/nowhere: /nowhere cannot be used"):
        store(config(tmp_path, resume="/nowhere")).plan()
    path = checkpoint(tmp_path / "old", "rl", 4)
    with pytest.raises(ValueError, match="checkpoint of stage rl, which job=all does not run"):
        store(config(tmp_path, stages=("sft",), resume=str(path))).plan()


def test_going_back_works_although_a_later_checkpoint_is_damaged(tmp_path):
    begun(config(tmp_path), "rl")
    early = checkpoint(tmp_path, "rl", 2)
    (checkpoint(tmp_path, "rl", 4) / "state.json").unlink()
    (checkpoint(tmp_path, "rl", 6, "final") / "state.json").unlink()
    back = store(config(tmp_path, resume=str(early)))
    assert back.plan()["rl"].step == 2
    back.settle("rl")
    assert by_age(tmp_path / "checkpoints" / "rl") == [early]


def test_a_checkpoint_of_another_run_refuses_other_settings_and_may_grow(tmp_path):
    old = config(tmp_path / "old")
    path = checkpoint(tmp_path / "old", "rl", 4, settings=settings(old, "rl"))
    assert store(config(tmp_path / "new", resume=str(path), algorithm=AlgorithmConfig(steps=50))).plan()["rl"].step == 4
    with pytest.raises(ValueError, match=r"learner\.lr=0\.5, began with .*algorithm\.init=FOLDER"):
        store(
            config(tmp_path / "new", resume=str(path), learner=dataclasses.replace(old.learner, lr=0.5)),
        ).plan()


def branch(tmp_path):
    """(config with resume=auto, the old run's checkpoint) of a branch whose RL has begun and was killed."""
    old = checkpoint(tmp_path / "old", "rl", 4)
    new = store(config(tmp_path / "new", resume=str(old)))
    new.plan()
    new.adopt("sft")
    new.begin("rl")
    new.settle("rl")
    return config(tmp_path / "new"), old


def test_a_branch_that_was_killed_goes_on_with_auto(tmp_path):
    run, old = branch(tmp_path)
    for attempt in (2, 3):
        again = store(run)
        plans = again.plan()
        assert plans["sft"].skip, "the old run's checkpoint already has it"
        assert (plans["rl"].resume.path, plans["rl"].attempt, plans["rl"].fresh) == (old, attempt, False)
        again.begin("rl")
    own = checkpoint(tmp_path / "new", "rl", 6)
    assert store(run).plan()["rl"].resume.path == own
    store(run).plan()
    assert json.loads((tmp_path / "new" / "stages" / "rl.json").read_text())["origin"] == str(old)


def test_a_branch_that_begins_again_sets_aside_what_it_had_made(tmp_path):
    run, old = branch(tmp_path)
    checkpoint(tmp_path / "new", "rl", 6)
    again = store(dataclasses.replace(run, resume=str(old)))
    again.plan()
    again.settle("rl")
    assert by_age(tmp_path / "new" / "checkpoints" / "rl") == []


def test_rl_of_a_branch_is_measured_against_what_the_old_run_started_from(tmp_path):
    _, old = branch(tmp_path)
    (tmp_path / "old" / "stages").mkdir()
    assert reference_of_branch(old) is None, "no cold start there: the run's own model"
    begun(config(tmp_path / "old", stages=("sft",)), "sft", steps=60)
    with pytest.raises(ValueError, match="has begun stage sft"):
        reference_of_branch(old)
    export = checkpoint(tmp_path / "old", "sft", 60, "final") / "hf"
    export.mkdir()
    assert reference_of_branch(old) == export
    with pytest.raises(ValueError, match=r"set algorithm\.reference"):
        reference_of_branch(tmp_path / "copied" / "rl" / "step000004")


# ---- what went missing ----


def test_after_falling_back_the_damaged_checkpoint_is_out_of_the_way(tmp_path):
    run = config(tmp_path, stages=("rl",))
    begun(run, "rl")
    good = checkpoint(tmp_path, "rl", 4)
    (checkpoint(tmp_path, "rl", 8) / OPTIMIZER_FOLDER / "state.pt").write_text("stale")
    again = store(run)
    assert again.plan()["rl"].resume.path == good
    again.settle("rl")
    newest = checkpoint(tmp_path, "rl", 5)
    prune(tmp_path / "checkpoints" / "rl", 1, "latest")
    found = newest_usable(tmp_path / "checkpoints" / "rl", lambda text: None)
    assert found is not None
    assert (found.path, found.resumable) == (newest, True)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_finished_stage_whose_last_checkpoint_is_lost_goes_on_from_the_one_before(tmp_path, how):
    run = config(tmp_path)
    begun(run, "sft", steps=60)
    before = checkpoint(tmp_path, "sft", 40)
    final = checkpoint(tmp_path, "sft", 60, "final")
    assert store(run).plan()["sft"].skip
    if how == "gone":
        shutil.rmtree(final)
    else:
        (final / OPTIMIZER_FOLDER / "state.pt").write_text("stale")
    said = []
    assert store(run, said).plan()["sft"].resume.path == before
    assert any("finished before, but its last checkpoint cannot be used" in line for line in said)
    begun(run, "rl")
    checkpoint(tmp_path, "rl", 2)
    assert store(run).plan()["sft"].skip, "RL has begun from it, and stands by itself"


def test_rl_does_not_begin_without_the_cold_start_that_the_folder_should_hold(tmp_path):
    run = config(tmp_path, stages=("rl",))
    StartingPoint.of(run).check_cold_start(store(run).plan())
    begun(config(tmp_path), "sft")
    with pytest.raises(ValueError, match=r"has begun stage sft, but .*checkpoints/sft/final.* is not there"):
        StartingPoint.of(run).check_cold_start(store(run).plan())
    StartingPoint.of(config(tmp_path)).check_cold_start(store(config(tmp_path)).plan())
    (checkpoint(tmp_path, "sft", 60, "final") / "hf").mkdir()
    StartingPoint.of(run).check_cold_start(store(run).plan())


def test_checkpoints_without_their_manifest_are_not_deleted(tmp_path):
    path = checkpoint(tmp_path, "sft", 40)
    with pytest.raises(ValueError, match=r"holds 1 checkpoints, but .*stages/sft\.json.* is missing"):
        store(config(tmp_path)).plan()
    assert store(config(tmp_path, resume=str(path))).plan()["sft"].step == 40
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "sft.json").write_text("{")
    assert store(config(tmp_path, resume=str(path))).plan()["sft"].step == 40


def test_a_cold_start_does_not_grow_under_rl_that_was_made_from_it(tmp_path):
    begun(config(tmp_path), "sft", steps=60)
    checkpoint(tmp_path, "sft", 60, "final")
    more = config(tmp_path, sft=SftConfig(steps=80))
    assert store(more).plan()["sft"].step == 60
    begun(config(tmp_path), "rl", steps=40)
    with pytest.raises(ValueError, match="stage sft cannot grow: stage rl"):
        store(more).plan()


# ---- what is cleared, what is compared ----


def test_starting_over_clears_the_stage_and_what_was_made_from_it_and_nothing_else(tmp_path):
    for stage in ("data", "sft", "rl"):
        begun(config(tmp_path), stage, steps=1)
        checkpoint(tmp_path, stage, 1)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "mlflow.db").write_text("history")
    clear(tmp_path, ["rl"])
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and "checkpoints" not in p.parts}
    assert left == {"stages/data.json", "stages/sft.json", "mlflow.db"}
    assert not (tmp_path / "checkpoints" / "rl").exists()
    assert (tmp_path / "checkpoints" / "sft").is_dir()


@pytest.mark.parametrize("survived", range(6))
def test_a_crash_while_clearing_leaves_no_stage_that_counts_as_finished_without_its_checkpoint(
    tmp_path, monkeypatch, survived
):
    for stage in ("sft", "rl"):
        begun(config(tmp_path), stage, steps=1)
        (checkpoint(tmp_path, stage, 1, "final") / "hf").mkdir()
    left = survived

    def crash(plain):
        def remove(path, *args, **kwargs):
            nonlocal left
            if not left:
                raise OSError("power cut")
            left -= 1
            return plain(path, *args, **kwargs)

        return remove

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash(shutil.rmtree))
        patch.setattr(pathlib.Path, "unlink", crash(pathlib.Path.unlink))
        with contextlib.suppress(OSError):
            clear(tmp_path, ["sft", "rl", "eval"])
    for stage in ("sft", "rl"):
        if store(config(tmp_path)).read(stage):
            assert (tmp_path / "checkpoints" / stage / "final" / "hf").is_dir()
    assert not (store(config(tmp_path)).read("rl") and not store(config(tmp_path)).read("sft"))


def test_settings_are_json_and_cover_what_the_stage_computes(tmp_path):
    run = config(tmp_path)
    for stage, needed in (("sft", "sft.batch"), ("rl", "algorithm.group_size"), ("data", "data.synthetic.seed")):
        values = settings(run, stage)
        assert json.loads(json.dumps(values)) == values
        assert needed in values
    assert "algorithm.group_size" not in settings(run, "sft")
    assert not {key for key in settings(run, "rl") if key.startswith(("cluster", "tracking", "checkpoint", "eval"))}


def test_a_stage_that_began_before_a_setting_existed_goes_on_with_its_default_only(tmp_path):
    run = config(tmp_path)
    begun(run, "sft")
    checkpoint(tmp_path, "sft", 3)
    path = tmp_path / "stages" / "sft.json"
    manifest = json.loads(path.read_text())
    assert manifest["settings"].pop("learner.grad_clip") == run.learner.grad_clip
    path.write_text(json.dumps(manifest))
    assert store(run).plan()["sft"].attempt == 2
    other = dataclasses.replace(run, learner=dataclasses.replace(run.learner, grad_clip=0.5))
    with pytest.raises(ValueError, match=r"learner\.grad_clip=0\.5, began with 1\.0"):
        store(other).plan()


@pytest.mark.parametrize("noted", [True, False])
def test_kernels_may_change_between_attempts_also_where_an_older_manifest_notes_them(tmp_path, noted):
    run = config(tmp_path)
    begun(run, "sft")
    begun(run, "rl")
    checkpoint(tmp_path, "rl", 3)
    path = tmp_path / "stages" / "rl.json"
    manifest = json.loads(path.read_text())
    if noted:
        manifest["settings"] |= {"rollout.attention": "auto", "model.vision_attention": "auto"}
        manifest["settings"] |= {"model.fused_kernels": "auto"}
        path.write_text(json.dumps(manifest))
    other = dataclasses.replace(
        run,
        rollout=dataclasses.replace(run.rollout, attention="torch"),
        model=dataclasses.replace(run.model, vision_attention="sdpa", fused_kernels="off"),
        learner=dataclasses.replace(run.learner, attention="sdpa", activation_checkpointing=True),
    )
    assert store(other).plan()["rl"].attempt == 2
    hotter = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, temperature=0.5))
    with pytest.raises(ValueError, match=r"rollout\.temperature=0\.5, began with 1\.0"):
        store(hotter).plan()

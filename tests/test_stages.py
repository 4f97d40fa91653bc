"""Resuming: what is skipped, what goes on, what is refused, decided before any actor starts."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conf.schema import AlgorithmConfig, JobConfig, MemoryConfig, RunConfig, SftConfig
from rl.checkpoint import OPTIMIZER_FOLDER, CheckpointState, commit, partial_path
from rl.stages import StageStore, clear, settings


def config(root, *, stages=("data", "sft", "rl", "eval"), **changes):
    return RunConfig(run_root=str(root), memory=MemoryConfig("full"), job=JobConfig("all", list(stages)), **changes)


def checkpoint(root, stage, step, name=None):
    path = root / "checkpoints" / stage / (name or f"step{step:06d}")
    partial = partial_path(path)
    (partial / OPTIMIZER_FOLDER).mkdir()
    (partial / OPTIMIZER_FOLDER / "state.pt").write_text("state")
    commit(partial, path, CheckpointState(stage, step, step, tuple(f"0/{i}" for i in range(step))))
    return path


def store(run, said=None):
    return StageStore(run.root, run, (said if said is not None else []).append)


def begun(run, stage, **finished):
    """What a stage leaves behind: a manifest, finished if a result is given."""
    kept = store(run)
    kept.plan()
    kept.begin(stage)
    if finished:
        kept.finish(stage, finished)


def with_data(root):
    (root / "data").mkdir(parents=True)
    for split in ("train", "heldout"):
        (root / "data" / f"{split}.jsonl").write_text("{}\n")


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
    assert store(run).plan()["sft"].attempt == 2
    train.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"data\.train \(content\)"):
        store(run).plan()


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
    plan = store(config(tmp_path, resume=str(early)), said).plan()["rl"]
    assert plan.step == 2
    assert (tmp_path / "checkpoints" / "rl" / "step000004.undone").is_dir()
    assert any("set aside" in line for line in said)


def test_a_path_that_is_no_checkpoint_or_of_a_stage_that_does_not_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume=/nowhere cannot be used"):
        store(config(tmp_path, resume="/nowhere")).plan()
    path = checkpoint(tmp_path / "old", "rl", 4)
    with pytest.raises(ValueError, match="checkpoint of stage rl, which job=all does not run"):
        store(config(tmp_path, stages=("sft",), resume=str(path))).plan()


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


def test_settings_are_json_and_cover_what_the_stage_computes(tmp_path):
    run = config(tmp_path)
    for stage, needed in (("sft", "sft.batch"), ("rl", "algorithm.group_size"), ("data", "data.synthetic.seed")):
        values = settings(run, stage)
        assert json.loads(json.dumps(values)) == values
        assert needed in values
    assert "algorithm.group_size" not in settings(run, "sft")
    assert not {key for key in settings(run, "rl") if key.startswith(("cluster", "tracking", "checkpoint", "eval"))}

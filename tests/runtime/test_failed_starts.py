"""A start that failed pins nothing: without a checkpoint nothing is compared; with one, everything still is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import RunConfig
from conf.training import AlgorithmConfig, SftConfig
from runtime.store.checkpoint import by_age
from runtime.store.manifests import StageStore, clear, settings
from streams.memory import MemoryConfig
from tests.support.stage import named
from tests.support.stages import begun, checkpoint, config, store, with_data

CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "memory": {"memory": MemoryConfig("rcsm", 3)},
    "sft.batch": {"sft": SftConfig(batch=4)},
    "fewer steps": {"sft": SftConfig(steps=30), "algorithm": AlgorithmConfig(steps=1)},
    "algorithm": {"algorithm": AlgorithmConfig(group_size=3)},
}


def changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    return dataclasses.replace(run, **changes)


def with_max_turns(run: RunConfig, turns: int) -> RunConfig:
    return changed(run, {"data": dataclasses.replace(run.data, max_turns=turns)})


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_stage_that_only_began_starts_over_under_corrected_settings(tmp_path, stage, name):
    run = config(tmp_path, stages=(stage,))
    begun(run, stage)
    said: list[str] = []
    again = store(changed(run, CHANGES[name]), said)
    plan = again.plan()[stage]
    assert (plan.fresh, plan.skip, plan.resume, plan.attempt) == (True, False, None, 2)
    differs = settings(again.config, stage) != settings(run, stage)
    assert again.corrected == differs
    assert any("the attempt before left nothing to go on from" in line for line in said) == differs
    clear(tmp_path, [stage])
    again.begin(stage)
    assert again.read(stage)["settings"] == settings(again.config, stage)


def test_what_a_training_that_was_killed_before_its_first_checkpoint_noted_binds_nothing(tmp_path):
    run = config(tmp_path, stages=("sft",))
    begun(run, "sft")
    (tmp_path / "stages" / "sft.steps.jsonl").write_text('{"step": 1}\n')
    shutil.move(checkpoint(tmp_path, "sft", 2), tmp_path / "checkpoints" / "sft" / "step000002.partial")
    assert store(changed(run, CHANGES["memory"])).plan()["sft"].fresh


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_checkpoint_binds_also_when_it_was_set_aside_for_its_successor(tmp_path, aside, own):
    run = config(tmp_path, stages=("sft",))
    begun(run, "sft")
    path = checkpoint(tmp_path, "sft", 2, "final", settings=settings(run, "sft") if own else {})
    if aside:
        path.rename(path.with_name("final.replaced"))
    with pytest.raises(ValueError, match=r"memory\.name='rcsm', began with 'full'"):
        store(changed(run, CHANGES["memory"])).plan()
    assert store(run).plan()["sft"].step == 2


def test_a_checkpoint_that_cannot_be_read_still_binds_by_the_manifest(tmp_path):
    run = config(tmp_path, stages=("sft",))
    begun(run, "sft")
    (checkpoint(tmp_path, "sft", 2) / "state.json").write_text("{")
    with pytest.raises(ValueError, match="began with other settings"):
        store(changed(run, CHANGES["memory"])).plan()


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_finished_stage_whose_growth_could_not_start_is_finished_as_before(tmp_path, stage):
    def steps(count: int) -> RunConfig:
        key = {"sft": {"sft": SftConfig(steps=count)}, "rl": {"algorithm": AlgorithmConfig(steps=count)}}
        return config(tmp_path, stages=(stage,), **key[stage])

    begun(steps(4), stage, steps=4)
    final = checkpoint(tmp_path, stage, 4, "final", settings=settings(steps(4), stage))
    grows = store(steps(9))
    assert grows.plan()[stage].resume.path == final
    grows.begin(stage)  # and then the memory was too small
    assert store(steps(4)).plan()[stage].skip
    grows.settle(stage)  # this time it was not, but it was killed before its first checkpoint
    assert grows.read(stage)["status"] == "begun"
    again = store(steps(4)).plan()[stage]
    assert (again.step, again.fresh) == (4, False)
    checkpoint(tmp_path, stage, 6, settings=settings(steps(9), stage))
    shutil.rmtree(final)
    with pytest.raises(ValueError, match="steps=4, began with 9"):
        store(steps(4)).plan()


def test_a_later_stage_that_only_began_does_not_keep_an_earlier_one_from_running(tmp_path):
    begun(config(tmp_path, stages=("rl",)), "rl")
    assert store(config(tmp_path)).plan()["sft"].fresh
    checkpoint(tmp_path, "rl", 2)
    with pytest.raises(ValueError, match="holds stage rl but not sft"):
        store(config(tmp_path)).plan()


def test_a_cold_start_grows_although_rl_failed_to_start_from_it(tmp_path):
    begun(config(tmp_path), "sft", steps=60)
    checkpoint(tmp_path, "sft", 60, "final")
    begun(config(tmp_path), "rl")
    assert store(config(tmp_path, sft=SftConfig(steps=80))).plan()["sft"].step == 60
    checkpoint(tmp_path, "rl", 2)
    with pytest.raises(ValueError, match="stage sft cannot grow: stage rl"):
        store(config(tmp_path, sft=SftConfig(steps=80))).plan()


def synthetic(run: RunConfig, seed: int) -> RunConfig:
    data = dataclasses.replace(run.data, synthetic=dataclasses.replace(run.data.synthetic, seed=seed))
    return changed(run, {"data": data})


def test_data_that_were_not_made_bind_nothing_and_those_that_were_do(tmp_path):
    run = config(tmp_path, stages=("data",))
    begun(run, "data")
    again = store(synthetic(run, 7))
    assert again.plan()["data"].fresh
    assert again.corrected
    begun(run, "data", train="x")
    assert store(synthetic(run, 7)).plan()["data"].fresh, "they are not there"
    with_data(tmp_path)
    with pytest.raises(ValueError, match=r"data\.synthetic\.seed=7, began with 0"):
        store(synthetic(run, 7)).plan()
    assert store(run).plan()["data"].skip
    own = changed(synthetic(run, 7), {"data": dataclasses.replace(synthetic(run, 7).data, train="t", heldout="h")})
    kept = store(own)
    assert kept.plan()["data"].skip, "the user's own data do not depend on the generator"
    assert not kept.corrected


def test_a_branch_that_failed_to_start_is_bound_by_the_checkpoint_it_goes_on_from_alone(tmp_path):
    at_home = config(tmp_path / "old")
    for noted in (False, True):
        path = checkpoint(tmp_path / "old", "rl", 4, settings=settings(at_home, "rl") if noted else {})
        root = tmp_path / f"new{noted}"
        first = store(config(root, resume=str(path)))
        first.plan()
        first.adopt("sft")
        first.begin("rl")
        fewer = with_max_turns(config(root), 7)
        if noted:
            with pytest.raises(ValueError, match=r"stage rl .*data\.max_turns=7, began with"):
                store(fewer).plan()
        else:
            branch = store(fewer)
            plans = branch.plan()
            assert not branch.corrected
            assert plans["sft"].skip
            assert plans["rl"].resume.path == path


def test_charts_go_on_unless_nothing_but_the_settings_of_a_failed_start_is_in_them(tmp_path):
    def goes_on(run: RunConfig) -> bool:
        planned = store(run)
        planned.plan()
        return planned.charts_go_on

    run = config(tmp_path)
    assert not goes_on(run), "the actors did not even start"
    begun(run, "sft")
    assert goes_on(run)
    assert not goes_on(changed(run, CHANGES["seed"]))
    checkpoint(tmp_path, "sft", 60, "final")
    assert goes_on(run)
    begun(run, "sft", steps=60)
    begun(run, "rl")
    fewer = changed(run, CHANGES["algorithm"])
    assert not goes_on(fewer), "the journal brings the cold start's steps into the new run"
    alone = dataclasses.replace(fewer, job=dataclasses.replace(fewer.job, stages=["rl"]))
    assert goes_on(alone), "the cold start's are in the one before"
    rl = checkpoint(tmp_path, "rl", 2)
    (tmp_path / "stages" / "sft.json").unlink()
    (tmp_path / "stages" / "rl.json").unlink()
    assert goes_on(config(tmp_path, resume=str(rl)))


# ---- the whole table ----


@st.composite
def situations(draw):
    """(stage, status, checkpoint, whether it says its settings, changed key)."""
    return (
        draw(st.sampled_from(["sft", "rl"])),
        draw(st.sampled_from(["none", "begun", "finished"])),
        draw(st.sampled_from(["none", "step", "final", "set aside", "unfinished"])),
        draw(st.booleans()),
        draw(st.sampled_from(["", *CHANGES])),
    )


@given(situation=situations())
def test_a_stage_is_bound_exactly_by_what_it_would_go_on_from(tmp_path_factory, situation):
    stage, status, kept, says, change = situation
    root = tmp_path_factory.mktemp("table")
    run = config(root, stages=(stage,))
    if status != "none":
        begun(run, stage, **({"steps": 60} if status == "finished" else {}))
    if kept != "none":
        name = "final" if kept == "final" else None
        path = checkpoint(root, stage, 3, name, settings=settings(run, stage) if says else {})
        if kept in ("set aside", "unfinished"):
            path.rename(path.with_name(path.name + (".replaced" if kept == "set aside" else ".partial")))
    now = changed(run, CHANGES[change] if change else {})
    differs = settings(now, stage) != settings(run, stage)
    usable = kept in ("step", "final", "set aside")
    again = store(now)
    if status == "none" and kept in ("step", "final"):
        with pytest.raises(ValueError, match="is missing, and starting over would delete them"):
            again.plan()
        return
    if differs and (status == "finished" or (status == "begun" and usable)):
        with pytest.raises(ValueError, match="began with other settings"):
            again.plan()
        return
    plan = again.plan()[stage]
    assert plan.skip == (status == "finished" and kept == "final")
    goes_on = status != "none" and usable and not plan.skip
    assert (plan.resume is not None) == goes_on
    assert plan.fresh == (not goes_on and not plan.skip)
    assert again.corrected == (differs and status == "begun")
    if goes_on:
        assert plan.resume.state.consumed == named("0/0", "0/1", "0/2")
        assert by_age(root / "checkpoints" / stage) == [plan.resume.path]


def test_a_manifest_of_an_earlier_version_is_read_the_same_way(tmp_path):
    run = config(tmp_path, stages=("sft",))
    path = Path(tmp_path / "stages" / "sft.json")
    path.parent.mkdir()
    path.write_text(json.dumps({"stage": "sft", "status": "begun", "attempts": 3, "settings": {"memory.window": 99}}))
    again = StageStore(run.root, run, print)
    assert again.plan()["sft"].attempt == 4
    assert again.corrected


def test_a_policy_that_an_earlier_version_noted_and_did_not_use_keeps_no_checkpoint_from_going_on(tmp_path):
    run = config(tmp_path, stages=("sft",))
    noted = settings(run, "sft") | {"memory.target": "my_memory:Mine", "memory.args.window": 3}
    begun(run, "sft")
    path = checkpoint(tmp_path, "sft", 3, settings=noted)
    assert store(run).plan()["sft"].resume.path == path
    own = changed(run, {"memory": MemoryConfig("custom", target="streams.memory:Full")})
    with pytest.raises(
        ValueError, match=r"memory\.name='custom', began with 'full'; memory\.target='streams\.memory:Full'"
    ):
        store(own).plan()

"""streaming.json: a checkpoint is run as it was trained, and who overrides it is told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conf.jobs import JobConfig
from conf.schema import MemoryConfig, RunConfig
from conf.streaming import STREAMING_FILE, apply_streaming, overridden_keys, read_streaming, streaming_settings
from runtime.starting_point import StartingPoint
from tests.support.configs import VIDEO, trained
from tests.support.starting import check_memory_policy

pytestmark = pytest.mark.smoke

ARGS = {"window": 2, "text_window": 3, "sink_tokens": 5, "tail_tokens": 6}


def written(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STREAMING_FILE).write_text(json.dumps(streaming_settings(config)))
    return folder


def test_what_is_written_is_what_is_applied(tmp_path):
    config = trained()
    other = RunConfig(memory=MemoryConfig("full"))
    applied = apply_streaming(other, read_streaming(written(tmp_path, config)), ())
    assert streaming_settings(applied.config) == streaming_settings(config)
    assert applied.conflicts == ()
    assert "memory.window=4" in applied.taken
    assert apply_streaming(config, read_streaming(tmp_path), ()).taken == (), "nothing to take: nothing to say"


@pytest.mark.parametrize(
    ("override", "change", "words"),
    [
        ("memory.window=8", ("memory", MemoryConfig("rcsm", 8)), "memory.window=8 (the checkpoint was made with 4)"),
        ("memory=recent_frames", ("memory", MemoryConfig("recent_frames", 4)), "memory.name='recent_frames'"),
        (
            "data.video.frames_per_chunk=2",
            ("data", None),
            "data.video.frames_per_chunk=2 (the checkpoint was made with 4)",
        ),
    ],
)
def test_an_override_that_contradicts_is_used_and_named_with_both_values(tmp_path, override, change, words):
    config = trained()
    saved = read_streaming(written(tmp_path, config))
    section, value = change
    if section == "data":
        value = dataclasses.replace(config.data, video=dataclasses.replace(VIDEO, frames_per_chunk=2))
    other = dataclasses.replace(config, job=JobConfig("eval", ["eval"]), **{section: value})
    applied = apply_streaming(other, saved, overridden_keys([override, "job=eval"]))
    assert applied.config == other
    assert any(words in conflict for conflict in applied.conflicts)


def test_an_override_that_says_the_same_is_no_conflict(tmp_path):
    config = trained()
    saved = read_streaming(written(tmp_path, config))
    assert apply_streaming(config, saved, overridden_keys(["memory.window=4"])).conflicts == ()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "memory": 3}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / STREAMING_FILE).write_text(content)
    with pytest.raises(ValueError, match=STREAMING_FILE):
        read_streaming(tmp_path)


def test_evaluation_warns_and_resuming_refuses(tmp_path):
    config = trained()
    written(tmp_path / "checkpoints" / "rl" / "final" / "hf", config)
    told, warned = [], []
    evaluating = dataclasses.replace(
        config, run_root=str(tmp_path), job=JobConfig("eval", ["eval"]), memory=MemoryConfig("rcsm", 8)
    )
    used = StartingPoint.of(evaluating).respected(["memory.window=8"], told.append, warned.append)
    assert used.memory.window == 8
    assert warned == ["memory.window=8 (the checkpoint was made with 4); the override is used"]
    resumed = dataclasses.replace(
        evaluating, job=JobConfig("rl", ["rl"]), resume=str(tmp_path / "checkpoints" / "rl" / "final")
    )
    with pytest.raises(ValueError, match=r"memory\.window=8 \(the checkpoint was made with 4\)"):
        StartingPoint.of(resumed).respected(["memory.window=8"], told.append, warned.append)


def test_evaluation_without_overrides_takes_the_checkpoints_settings(tmp_path):
    written(tmp_path / "checkpoints" / "sft" / "final" / "hf", trained())
    told = []
    plain = RunConfig(run_root=str(tmp_path), job=JobConfig("eval", ["eval"]), memory=MemoryConfig("full"))
    used = StartingPoint.of(plain).respected(["job=eval"], told.append, pytest.fail)
    assert used.memory == MemoryConfig("rcsm", 4)
    assert used.data.video.frames_per_chunk == 4
    assert any("memory.window=4" in line for line in told)


def test_a_checkpoint_from_before_a_knob_runs_as_it_was_trained(tmp_path):
    """It knew name and window only: all its text stayed, whatever the configuration now says of text."""
    settings = streaming_settings(trained()) | {"memory": {"name": "rcsm", "window": 4}}
    (tmp_path / STREAMING_FILE).write_text(json.dumps(settings))
    now = dataclasses.replace(trained(), memory=MemoryConfig("sink_window", 2, 3, sink_tokens=5, tail_tokens=6))
    applied = apply_streaming(now, read_streaming(tmp_path), ())
    assert applied.config.memory == MemoryConfig("rcsm", 4)
    assert "memory.text_window=0" in applied.taken
    other = dataclasses.replace(now, memory=MemoryConfig("rcsm", 4, text_window=6))
    conflicts = apply_streaming(other, read_streaming(tmp_path), overridden_keys(["memory.text_window=6"])).conflicts
    assert conflicts == ("memory.text_window=6 (the checkpoint was made with 0)",)


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig("rcsm", 4, text_window=9),
        MemoryConfig("sink_window", 2, 3, sink_tokens=5, tail_tokens=6),
        MemoryConfig("visual_budget", video_tokens=99),
        MemoryConfig("random", seed=7, rate=0.25),
        MemoryConfig("custom", target="tests.streams.test_custom_memory:Wrong", args={"answer": "int"}),
    ],
)
def test_every_policys_knobs_survive_the_file(tmp_path, memory):
    saved = read_streaming(written(tmp_path, dataclasses.replace(trained(), memory=memory)))
    assert apply_streaming(trained(), saved, ()).config.memory == memory


def test_one_argument_of_ones_own_policy_can_be_overridden(tmp_path):
    memory = MemoryConfig("custom", target="tests.streams.test_custom_memory:Wrong", args={"answer": "int"})
    saved = read_streaming(written(tmp_path, dataclasses.replace(trained(), memory=memory)))
    other = dataclasses.replace(trained(), memory=dataclasses.replace(memory, args={"answer": "list"}))
    applied = apply_streaming(other, saved, overridden_keys(["+memory.args.answer=list"]))
    assert applied.config == other
    assert applied.conflicts == ("memory.args.answer='list' (the checkpoint was made with 'int')",)


def test_the_other_arguments_stay_the_checkpoints(tmp_path):
    memory = MemoryConfig("custom", target="streams.memory:SinkWindow", args=dict(ARGS))
    saved = read_streaming(written(tmp_path, dataclasses.replace(trained(), memory=memory)))
    typed = dataclasses.replace(trained(), memory=MemoryConfig("rcsm", 4, args={"window": 3}))
    applied = apply_streaming(typed, saved, overridden_keys(["+memory.args.window=3"]))
    assert applied.config.memory == dataclasses.replace(memory, args=ARGS | {"window": 3})
    assert applied.conflicts == ("memory.args.window=3 (the checkpoint was made with 2)",)
    assert "memory.args.tail_tokens=6" in applied.taken
    given = dataclasses.replace(memory, args=ARGS | {"text_window": 4})
    whole = apply_streaming(
        dataclasses.replace(trained(), memory=given), saved, overridden_keys([f"+memory.args={given.args}"])
    )
    assert whole.config.memory == given


def test_another_policy_by_name_takes_neither_target_nor_arguments_from_the_checkpoint(tmp_path):
    memory = MemoryConfig("custom", target="streams.memory:SinkWindow", args=dict(ARGS))
    saved = read_streaming(written(tmp_path, dataclasses.replace(trained(), memory=memory)))
    typed = dataclasses.replace(trained(), memory=MemoryConfig("full"))
    for override in ("memory.name=full", "memory=full"):
        applied = apply_streaming(typed, saved, overridden_keys([override]))
        assert (applied.config.memory.name, applied.config.memory.target, applied.config.memory.args) == (
            "full",
            "",
            {},
        )
        check_memory_policy(applied.config)


def test_a_target_that_an_earlier_version_noted_and_did_not_use_is_left_where_it_is(tmp_path):
    settings = streaming_settings(trained())
    settings["memory"] |= {"target": "a_module_that_is_elsewhere:Mine", "args": {"window": 3}}
    (tmp_path / STREAMING_FILE).write_text(json.dumps(settings))
    assert apply_streaming(RunConfig(memory=MemoryConfig("full")), read_streaming(tmp_path), ()).config.memory == (
        trained().memory
    )


@pytest.mark.parametrize(
    ("memory", "takes"),
    [
        (MemoryConfig("rcsm", 4, args={"window": 3}), "window, text_window"),
        (MemoryConfig("full", args={"a": 1}), "it has none"),
    ],
)
def test_arguments_without_a_policy_of_ones_own_are_refused_before_anything_starts(tmp_path, memory, takes):
    config = dataclasses.replace(trained(), memory=memory)
    with pytest.raises(
        ValueError, match=rf"memory\.args=\{{.*\}} with memory\.name={memory.name}, .*\({takes}\): set memory"
    ):
        check_memory_policy(config)


def test_what_a_checkpoint_brings_and_cannot_be_used_is_told_from_what_was_typed(tmp_path):
    missing = streaming_settings(trained())
    missing["memory"] |= {"name": "custom", "target": "a_module_that_is_elsewhere:Mine"}
    (tmp_path / STREAMING_FILE).write_text(json.dumps(missing))
    with pytest.raises(
        ValueError, match=r"a_module_that_is_elsewhere.* \(what the checkpoint's streaming\.json says: .*"
    ):
        apply_streaming(trained(), read_streaming(tmp_path), ())

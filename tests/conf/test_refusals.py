"""Memory knobs that make no sense are refused at start, by key, before any process starts or any weight is read."""

from __future__ import annotations

import json

import pytest

from conf.schema import RunConfig
from tests.support.commands import launch
from tests.support.configs import composed
from tests.support.starting import check_memory_policy


def folder(path, **values):
    """A checkpoint folder that says what it is and holds no weights."""
    path.mkdir(parents=True)
    config = {"model_type": "qwen3_vl", "vision_config": {"patch_size": 16, "spatial_merge_size": 2}} | values
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.window=0"], r"memory\.window=0 must be at least 1"),
        (["memory=recent_frames", "memory.window=-3"], r"memory\.window=-3 must be at least 1"),
        (["memory=sink_window", "memory.text_window=0"], r"memory\.text_window=0 must be at least 1"),
        (["memory.text_window=-1"], r"memory\.text_window=-1 must not be negative"),
        (["memory=sink_window", "memory.sink_tokens=-1"], r"memory\.sink_tokens=-1 must not be negative"),
        (["memory=sink_window", "memory.tail_tokens=-5"], r"memory\.tail_tokens=-5 must not be negative"),
        (["memory=visual_budget", "memory.video_tokens=0"], r"memory\.video_tokens=0 must be at least"),
        (["memory=random", "memory.rate=1.5"], r"memory\.rate=1\.5 must lie in \[0, 1\]"),
        (["memory=random", "memory.seed=-1"], r"memory\.seed=-1 must not be negative"),
        (["memory.name=custom"], r"memory\.target='' with memory\.name=custom"),
        (
            ["memory.target=my_memory:KeepAnswers"],
            r"memory\.target='my_memory:KeepAnswers' with memory\.name=rcsm: .*set memory\.name=custom",
        ),
        (["memory=full", "memory.target=a:B"], r"memory\.target='a:B' with memory\.name=full"),
        (["memory.name=forgetful"], r"memory\.name='forgetful' is not one of"),
        (["layout.think_budget=1"], r"layout\.think_budget=1 must hold at least both think tags"),
        (
            ["layout.think_budget=9", "layout.max_new_tokens=10"],
            r"layout\.max_new_tokens=10 must leave room .*budget=9",
        ),
    ],
)
def test_what_no_backbone_could_do_is_refused_when_the_config_is_read(overrides, message):
    with pytest.raises(ValueError, match=message):
        composed(*overrides)


TIMES_LEAVE = r"text stays for 2 turns \(memory\.text_window\) but video for memory\.window=4"


@pytest.mark.parametrize(
    "memory",
    [
        ["memory.text_window=2"],
        ["memory=sink_window", "memory.window=4", "memory.text_window=2"],
    ],
)
def test_text_that_leaves_before_the_video_whose_time_it_tells_is_refused_for_every_kind_of_checkpoint(
    tmp_path, memory
):
    composed_memory = [*memory, f"run_root={tmp_path / 'run'}"]
    for model in ("model=tiny_qwen3_vl", f"model.path={folder(tmp_path / 'qwen3')}"):
        with pytest.raises(ValueError, match=TIMES_LEAVE):
            check_memory_policy(composed(*composed_memory, model))
    # Qwen2.5-VL tells time by positions; a hub id says what it is when its config.json is there
    # (runtime.planning.device_plan asks again).
    other = folder(tmp_path / "qwen2", model_type="qwen2_5_vl", vision_config={"patch_size": 14})
    for model in ("model=tiny", f"model.path={other}", "model=qwen3_vl_2b"):
        check_memory_policy(composed(*composed_memory, model))


def test_the_checkpoint_that_is_evaluated_decides_not_the_model_of_the_configuration(tmp_path):
    checkpoint = folder(tmp_path / "qwen3")
    words = ["job=eval", f"eval.checkpoint={checkpoint}", "memory.text_window=2", f"run_root={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=TIMES_LEAVE):
        check_memory_policy(composed(*words))
    other = folder(tmp_path / "qwen2", model_type="qwen2_5_vl", vision_config={"patch_size": 14})
    check_memory_policy(composed(*words[:1], f"eval.checkpoint={other}", *words[2:], "model=tiny_qwen3_vl"))


@pytest.mark.parametrize(("patch", "tokens"), [(14, 192), (16, 147)])
def test_a_budget_below_one_chunk_is_refused_by_the_size_of_the_backbones_tokens(tmp_path, patch, tokens):
    model = folder(tmp_path / "model", vision_config={"patch_size": patch})
    words = [
        f"model.path={model}",
        "memory=visual_budget",
        "data.video.max_pixels=150528",
        f"run_root={tmp_path / 'run'}",
    ]
    with pytest.raises(ValueError, match=rf"memory\.video_tokens={tokens - 1} cannot hold one chunk of {tokens} video"):
        check_memory_policy(composed(*words, f"memory.video_tokens={tokens - 1}"))
    check_memory_policy(composed(*words, f"memory.video_tokens={tokens}"))


@pytest.mark.parametrize("content", ["{", "[3]", '{"model_type": "qwen3_vl"}'])
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
    path = folder(tmp_path / "model")
    (path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.path={path}: config\.json"):
        check_memory_policy(composed(f"model.path={path}", f"run_root={tmp_path / 'run'}"))


def test_what_is_set_and_has_no_effect_is_said():
    def notes(*overrides: str) -> str:
        return "\n".join(composed(*overrides).notes())

    assert composed().notes() == []
    assert "memory.name=rcsm does not take memory.sink_tokens=3" in notes("memory.sink_tokens=3")
    assert "memory.name=full does not take memory.window=4" in notes("memory=full")
    assert "memory.name=text_memory does not take memory.window=4" in notes("memory=text_memory")
    assert "memory.window=7 is not below data.max_turns=7: no stream" in notes("memory.window=7", "data.max_turns=7")
    assert notes("memory.window=7", "data.max_turns=8") == ""
    assert "note: rl has no warm-up, learner.schedule=constant" in notes("learner.schedule=constant")
    warm = ("sft.learner.schedule=constant", "sft.learner.warmup_steps=0", "sft.warmup_ratio=0.1")
    assert "note: sft has no warm-up" in notes(*warm)
    assert notes(*warm, "job=rl") == notes(*warm[:2]) == ""
    assert isinstance(composed(*warm), RunConfig)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_ends_before_anything_starts(tmp_path):
    done = launch("model=tiny_qwen3_vl", "memory.text_window=2", f"run_root={tmp_path / 'run'}", limit_s=120)
    assert done.returncode == 2
    assert done.stderr.startswith("configuration error: memory: text stays for 2 turns (memory.text_window)")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()

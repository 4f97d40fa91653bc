"""job=watch through the command line: what it prints is what the engine does, under the checkpoint's own settings."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from conf.streaming import streaming_settings
from launch import plain_words
from rollout.engine.engine import Engine
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from tests.support.clips import write_clip
from tests.support.commands import interrupted, launch
from tests.support.configs import composed, trained
from tests.support.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(checkpoint with streaming.json, video of 6.5 s)."""
    folder = tmp_path_factory.mktemp("watch")
    config = trained()
    backbone = Backbone.load(build_tiny(folder / "tiny", seed=3, gain=2.0, std=1.0), config.layout)
    backbone.save(folder / "hf", streaming_settings(config))
    frames = np.random.default_rng(0).integers(0, 256, (65, 64, 64, 3), dtype=np.uint8)
    write_clip(folder / "clip.mp4", frames, 10, {})
    return folder / "hf", folder / "clip.mp4"


def watched(made, *words):
    model, video = made
    done = launch("job=watch", f"video={video}", f"model={model}", "watch.json=true", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def turns(made):
    return watched(made, 'query=What, exactly, is "this"?', "at=2.2")[0]


def test_every_chunk_is_one_line_with_the_checkpoints_chunk_length(turns):
    assert [turn["start_s"] for turn in turns] == [i * 0.5 for i in range(13)]
    assert turns[-1]["end_s"] == 6.5
    assert all(turn["seconds"] > 0 for turn in turns)


def test_the_query_arrives_in_its_chunk_as_it_was_typed(turns):
    assert {i: turn["query"] for i, turn in enumerate(turns) if turn["query"]} == {4: 'What, exactly, is "this"?'}


def test_memory_holds_the_window_of_video_and_all_text(turns):
    # 64x64 pixels under the budget of 1,568: two merged tokens a temporal patch, two patches a chunk, window 4.
    per_chunk = turns[0]["memory_video"]
    assert [turn["memory_video"] for turn in turns] == [per_chunk * min(i + 1, 4) for i in range(13)]
    text = [turn["memory_tokens"] - turn["memory_video"] for turn in turns]
    assert text == sorted(text)
    assert text[-1] > text[0]


def test_it_says_what_the_engine_says_when_all_features_are_there_at_once(made, turns):
    from evals.watch.stream import EncodedOnDemand, _request
    from evals.watch.watched import WatchedFile
    from streams.task import TimedQuery
    from streams.video.reader import ClipReader

    model, video = made
    config = trained()
    backbone = Backbone.load(model, config.layout)
    shown = WatchedFile(str(video), 6.5, (TimedQuery(2.2, 'What, exactly, is "this"?'),), 6.5)
    with ClipReader(config.data.video) as reader:
        clip = reader.read(str(video), 0.0, 6.5, 13)
    request = _request(config, backbone, shown, clip, 0.5)
    assert isinstance(request.features, EncodedOnDemand)
    engine = Engine(backbone, 20000, 4)
    engine.add(request)
    logs = []
    while engine.busy:
        logs += engine.step()
    expected = [(turn.thought, turn.response) for turn in backbone.layout.parse_turns(logs[0])]
    assert [(turn["thought"], turn["response"]) for turn in turns] == expected


def test_a_contradicting_override_is_used_and_warned_about_with_both_values(made):
    turns, said = watched(made, "memory.window=2", "seconds=3")
    assert "memory.window=2 (the checkpoint was made with 4); the override is used" in said
    assert turns[-1]["memory_video"] == 2 * turns[0]["memory_video"]
    assert len(turns) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["video=/nowhere.mp4", "model={model}"], "/nowhere.mp4: the file cannot be read"),
        (["video={video}", "model=/nowhere/model"], "model.path=/nowhere/model"),
        (["model={model}"], "watch.video is empty"),
        (["video={video}"], "model.path is empty"),
        (["video={video}", "model={model}", "query=now?", "at=99"], "watch.at=99 lies after the end"),
    ],
)
def test_what_cannot_be_watched_is_said_in_one_line(made, capsys, words, message):
    from evals.watch.job import watch

    model, video = made
    overrides = plain_words(["job=watch", *(word.format(model=model, video=video) for word in words)])
    with pytest.raises(SystemExit) as ended:
        watch(composed(*overrides), overrides)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("configuration error: ")


def test_the_command_ends_with_status_2_and_without_a_traceback(made):
    done = launch("job=watch", f"video={made[0]}/config.json", f"model={made[0]}")
    assert done.returncode == 2
    assert "not a supported video" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_without_settings_is_watched_with_those_of_the_configuration_and_says_so(tmp_path, made):
    Backbone.load(build_tiny(tmp_path / "tiny", seed=3), LayoutConfig())
    done = launch("job=watch", f"video={made[1]}", f"model={tmp_path / 'tiny'}", "seconds=2", "memory=full")
    assert done.returncode == 0, done.stderr
    assert "has no streaming.json" in done.stderr
    assert MemoryConfig("full").name in done.stdout


@pytest.mark.parametrize(
    ("after", "ready"),
    [
        (0.02, ""),
        (0.4, ""),
        (0.8, ""),
        (2.1, ""),
        (3.6, ""),
        (0.0, "memory rcsm"),
        (0.3, "memory rcsm"),
        (0.0, "5.0-5.5 s"),
    ],
    ids=["schema", "configuration", "torch", "model", "film", "introduced", "first turns", "turns"],
)
def test_ctrl_c_ends_it_with_one_line_and_leaves_nobody_behind(made, tmp_path, after, ready):
    frames = np.random.default_rng(0).integers(0, 256, (600, 64, 64, 3), dtype=np.uint8)
    write_clip(tmp_path / "long.mp4", frames, 10, {})
    status, _, err = interrupted(
        "job=watch", f"video={tmp_path / 'long.mp4'}", f"model={made[0]}", after=after, ready=ready
    )
    assert status == 130
    assert err.splitlines() == ["stopped by Ctrl-C"]


def test_a_reader_that_goes_ends_it_without_a_word(made):
    words = f"job=watch video={made[1]} model={made[0]}"
    script = f"{sys.executable} launch.py {words} | head -n 3; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "1"
    assert done.stderr == ""

"""`~` in paths: home wherever a user may write one, in the configuration, in rows and on command lines, or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given as always
from hypothesis import strategies as st

from conf.paths import PATH_KEYS, with_home
from conf.schema import RunConfig
from launch import plain_words
from runtime.store.manifests import StageStore, settings
from streams.data.dataset import load_tasks, write_tasks
from streams.support.paths import expand_home
from streams.task import ExpectedAnswer, StreamTask, TimedQuery
from tests.support.configs import composed
from tests.support.project import ROOT

NOBODY = "no-such-user-here"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def value_of(config: RunConfig, key: str) -> str:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def given(key: str, value: str) -> RunConfig:
    """The configuration with one key as it is typed on a command line."""
    words = [f"{key}={value}"]
    if key.startswith("data."):
        words = ["data.train=x", "data.heldout=x", *words]
    return composed(*plain_words(words))


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_path_of_the_configuration_may_begin_with_the_home_folder(home, key):
    assert value_of(given(key, "~/some folder/x"), key) == f"{home}/some folder/x"
    assert value_of(given(key, "~root/x"), key) == f"{os.path.expanduser('~root')}/x"
    assert value_of(given(key, "/a/~b"), key) == "/a/~b", "only the first character means home"
    with pytest.raises(ValueError, match=rf"{re.escape(key)}='~{NOBODY}/x'.*no user '{NOBODY}'"):
        given(key, f"~{NOBODY}/x")


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_home_folder_that_is_not_known_is_named_with_its_key(monkeypatch, key):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match=rf"{re.escape(key)}='~/x'.*HOME"):
        given(key, "~/x")


def test_every_key_that_sounds_like_a_path_is_on_the_list():
    """A new one must not be forgotten."""
    kinds = {
        "path",
        "train",
        "heldout",
        "root",
        "checkpoint",
        "init",
        "reference",
        "resume",
        "run_root",
        "uri",
        "video",
    }

    def texts(section, prefix=""):
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            if dataclasses.is_dataclass(value):
                yield from texts(value, f"{prefix}{item.name}.")
            elif isinstance(value, str):
                yield prefix + item.name

    found = {key for key in texts(composed()) if key.rpartition(".")[2] in kinds}
    assert found == set(PATH_KEYS)


@pytest.mark.parametrize(
    ("typed", "loaded"),
    [
        ("sqlite:///~/m.db", "sqlite:///{home}/m.db"),
        ("~/mlruns", "{home}/mlruns"),
        ("file:~/mlruns", "file://{home}/mlruns"),
        ("file:///~/mlruns", "file://{home}/mlruns"),
        ("http://host:5000/~user/x", "http://host:5000/~user/x"),
        ("postgresql://u:p@h/~db", "postgresql://u:p@h/~db"),
    ],
)
def test_a_tracking_uri_that_names_a_local_store_is_a_path_too(home, typed, loaded):
    assert composed(*plain_words([f"tracking.uri={typed}"])).tracking.uri == loaded.format(home=home)


def test_a_stage_that_began_with_a_tilde_is_still_the_same_stage(home):
    config = given("model.path", "~/model")
    store = StageStore(home, config, print)
    store._check_settings("sft", settings(config, "sft") | {"model.path": "~/model"})
    with pytest.raises(ValueError, match=r"model\.path"):
        store._check_settings("sft", settings(config, "sft") | {"model.path": "~/other"})


@pytest.mark.parametrize("fields", [{"id": "a", "video": "{}"}, {"video_path": "{}"}])
def test_a_rows_video_may_lie_under_the_home_folder(home, tmp_path, fields):
    def loaded(video: str):
        row = {key: value.format(video) for key, value in fields.items()}
        if "id" in row:
            row |= {"start": 0, "end": 4, "queries": [{"time": 1, "text": "?"}], "answers": [{"time": 2, "text": "b"}]}
        else:
            row["conversations"] = [
                {"role": "user", "content": "?", "timestamp": 1},
                {"role": "assistant", "content": "b", "timestamp": 2},
            ]
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        return load_tasks(path, on_bad="raise").tasks[0].video

    assert loaded("~/videos/a.mp4") == f"{home}/videos/a.mp4"
    assert loaded("./~a.mp4") == f"{tmp_path}/~a.mp4"
    assert loaded("b/~/a.mp4") == f"{tmp_path}/b/~/a.mp4"
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: video(_path)?='~{NOBODY}/a\.mp4'.*no user"):
        loaded(f"~{NOBODY}/a.mp4")


def test_rows_of_a_video_whose_name_begins_with_a_tilde_are_read_back_equal(tmp_path):
    question = (TimedQuery(1.0, "?"),), (ExpectedAnswer(2.0, "red"),)
    tasks = (StreamTask("a", str(tmp_path / "~a.mp4"), 0.0, 4.0, *question),)
    write_tasks(tmp_path / "rows.jsonl", tasks)
    assert load_tasks(tmp_path / "rows.jsonl").tasks == tasks


def test_the_checkers_command_line_knows_the_home_folder(tmp_path):
    def check(*words):
        command = [sys.executable, "-m", "streams.data.check", *words]
        env = os.environ | {"HOME": str(tmp_path)}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)

    done = check("~/rows.jsonl")
    assert f"{tmp_path}/rows.jsonl does not exist" in done.stderr
    done = check("x.jsonl", f"--write=~{NOBODY}/out.jsonl")
    assert done.returncode == 2
    assert f"there is no user '{NOBODY}'" in done.stderr


@always(st.text(max_size=12))
def test_a_path_that_does_not_begin_with_somebodys_home_is_never_changed(text):
    if not text.startswith("~") or text[1:2] in tuple("+ *"):
        assert expand_home(text) == text
    assert with_home("seed", text) == text


def test_an_empty_home_does_not_make_a_path_of_the_root_folder(monkeypatch):
    monkeypatch.setenv("HOME", "")
    for path in ("~", "~/x"):
        with pytest.raises(ValueError, match="HOME"):
            expand_home(path)

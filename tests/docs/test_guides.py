"""The guides' examples do what the guides say."""

from __future__ import annotations

import math
import re
import sys

import pytest
import ray
import yaml

from conf.data import DataConfig
from conf.schema import RunConfig
from rewards import Reward, RewardConfig, StreamOutcome
from rewards.registry import _factories
from rewards.scorer import Scorer
from streams.data.dataset import load_tasks
from streams.data.formats.sightline import _ROW_KEYS
from streams.data.formats.thinkstream import _ROW_KEYS as RECORD_KEYS
from streams.messages import RewardJob
from streams.task import Plan
from tests.support.configs import composed
from tests.support.guides import DOCS, blocks
from tests.support.rewards import one_answer, stream


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """The guide's module, importable here as it would be beside launch.py."""
    (source,) = blocks("rewards.md", "python")
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield source
    sys.modules.pop("my_rewards", None)


def preset() -> dict:
    (text,) = blocks("rewards.md", "yaml")
    return yaml.safe_load(text)


LONG = "it is a red car on the road"


def test_the_rewards_guide_needs_under_thirty_lines_and_its_example_works(my_rewards):
    assert len(my_rewards.splitlines()) < 30
    reward = Reward.from_config(RewardConfig(**preset()))
    task = one_answer(2, 5)
    result = reward(StreamOutcome(task, stream({5: "red"}), 1.0))
    assert result.components == {"correctness": 1.0, "timing": 1.0, "brief": 1.0}
    # Eight words, two over: 0.6; wrong; two chunks late with slack 1: 0.75.
    result = reward(StreamOutcome(task, stream({7: LONG}), 1.0))
    assert result.components == pytest.approx({"correctness": 0.0, "timing": 0.75, "brief": 0.6})
    assert result.total == pytest.approx(0.3 * 0.75 + 0.1 * 0.6)
    assert reward(StreamOutcome(task, stream({}), 1.0)).components["brief"] == 0.0


def test_the_guides_command_line_composes(my_rewards):
    (command,) = blocks("rewards.md", "bash")
    overrides = [part.strip("'") for part in re.findall(r"'[^']*'|\S+", command)][2:]
    config = composed(*overrides)
    assert isinstance(config, RunConfig)
    assert set(config.reward.terms) == {"format", "correctness", "timing", "brief"}
    assert Reward.from_config(config.reward)(StreamOutcome(one_answer(2, 5), stream({5: "red"}), 1.0)).total == 1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"target": "my_reward:Brief"}, r"reward\.terms\.brief\.target='my_reward:Brief' cannot be loaded \(No module"),
        ({"target": "my_rewards:Breif"}, r"reward\.terms\.brief\.target='my_rewards:Breif' cannot be loaded"),
        ({"target": "my_rewards:Brief", "word": 3}, r"reward\.terms\.brief\.word=3: .* takes slope, words"),
        ({"target": "my_rewards:Brief", "words": 0}, r"reward\.terms\.brief\.words=0 must be at least 1"),
    ],
)
def test_what_is_wrong_with_ones_own_reward_is_said_by_key(my_rewards, params, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig("product", {"brief": params})


@pytest.mark.slow
def test_ones_own_reward_runs_in_the_scorer_actor_or_the_actor_says_why_not(my_rewards, tmp_path):
    task = one_answer(2, 5)
    config = RewardConfig(**preset())
    job = RewardJob("0/a", task, Plan(10, 1.0), (stream({5: "red"}), stream({7: LONG})))

    def start(path: str):
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": f"{DOCS.parent}:{path}"}},
        )
        return ray.remote(Scorer).options(num_cpus=0.1).remote(config)

    try:
        ((first, second),) = ray.get(start(str(tmp_path)).score.remote((job,)), timeout=120)
        assert (first.total, first.failed, second.failed) == (1.0, None, None)
        assert second.components["brief"] == pytest.approx(0.6)
    finally:
        ray.shutdown()
    sys.path.remove(str(tmp_path))
    try:
        with pytest.raises(ray.exceptions.RayActorError) as caught:
            ray.get(start("").pid.remote(), timeout=120)
    finally:
        ray.shutdown()
    assert "reward.terms.brief.target='my_rewards:Brief' cannot be loaded" in str(caught.value)
    assert "must be importable there" in str(caught.value)


def test_every_term_is_in_the_guide():
    text = (DOCS / "rewards.md").read_text()
    terms = [name for name, made in _factories.items() if made.__module__.startswith("rewards.")]
    assert len(terms) >= 8
    assert not [name for name in terms if f"`{name}`" not in text]
    presets = [path.stem for path in (DOCS.parent / "conf" / "reward").glob("*.yaml")]
    assert not [name for name in presets if f"`reward={name}`" not in text]


def test_the_rows_of_the_data_guide_are_tasks(tmp_path):
    ours, records = blocks("data.md", "json")
    for name, text, count in (("ours", ours, 3), ("records", records, 2)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        loaded = load_tasks(path, on_bad="raise")
        assert len(loaded.tasks) == count, name
    tasks = load_tasks(tmp_path / "ours.jsonl").tasks
    assert [task.end for task in tasks] == [60.0, math.inf, 95.0]
    assert tasks[2].queries[0].until == 90.0
    tasks = load_tasks(tmp_path / "records.jsonl").tasks
    assert [(task.id, task.answers[0].kind) for task in tasks] == [("1-a", "text"), ("2-b", "choice")]


def test_the_data_guide_names_every_field_and_the_defaults_of_its_keys():
    text = (DOCS / "data.md").read_text()
    assert not [key for key in _ROW_KEYS | RECORD_KEYS if f"`{key}" not in text]
    data = DataConfig()
    for key, value in (
        ("data.video.chunk_seconds", data.video.chunk_seconds),
        ("data.video.frames_per_chunk", data.video.frames_per_chunk),
        ("data.video.max_chunks", data.video.max_chunks),
        ("data.tail_chunks", data.tail_chunks),
        ("data.max_turns", data.max_turns),
    ):
        assert f"| `{key}` | {value} |" in text, key
    for video in (data.video, composed("data=jsonl", "data.train=a", "data.heldout=b").data.video):
        assert f"{video.min_pixels}, {video.max_pixels}" in text


def test_the_script_of_the_data_guide_writes_a_task_file(tmp_path, monkeypatch):
    (source,) = blocks("data.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "questions.csv").write_text("file,asked,question,due,answer\na.mp4,1,What?,4.5,red\n")
    exec(compile(source, "data.md", "exec"), {})
    (task,) = load_tasks(tmp_path / "videos" / "train.jsonl", on_bad="raise").tasks
    assert (task.video, task.answers[0].time) == (str(tmp_path / "videos" / "a.mp4"), 4.5)

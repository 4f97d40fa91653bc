"""A tiny model and real clips for the tests of the rollout service; modules with needs of their own define theirs."""

from __future__ import annotations

import pytest

from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.data.dataset import load_tasks
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from tests.support.service import worker_setup


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    made = generate(tmp_path_factory.mktemp("clips") / "data", SyntheticConfig(train_clips=3, heldout_per_mode=1))
    return load_tasks(made.train_jsonl, on_bad="raise").tasks


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    checkpoint = build_tiny(tmp_path_factory.mktemp("model"), TinySpec(hidden=64, layers=2, mlp=128), seed=1, gain=2.0)
    layout = LayoutConfig(system_prompt="Watch.", think_budget=4, max_new_tokens=7)
    return worker_setup(checkpoint, layout=layout, memory=MemoryConfig("rcsm", 3), run_seed=5)

"""A user's own memory policy: the guide's example runs, exactly; what is wrong with one is said by key."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from conf.streaming import streaming_settings
from rollout.engine.engine import Engine
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.log.record import Kind
from streams.memory import POLICIES, Lanes, LiveTokens, MemoryConfig, MemoryPolicy, TurnStart, knobs, make_policy
from tests.support.configs import composed
from tests.support.guides import DOCS, blocks
from tests.support.service import open_service, worker_setup
from tests.support.starting import check_memory_policy, describe
from tests.support.streams import (
    FP64_BAR,
    differences,
    loud_backbone,
    norms_in_input_dtype,
    random_requests,
    random_turns,
    request,
    run,
    run_to_the_end,
)

GUIDE = "memory.md"


@pytest.fixture
def my_memory(tmp_path, monkeypatch):
    """The guide's module, importable here as it would be beside launch.py."""
    (source,) = blocks(GUIDE, "python")
    (tmp_path / "my_memory.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield source
    sys.modules.pop("my_memory", None)


def written() -> dict:
    (text,) = blocks(GUIDE, "yaml")
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def fp64(tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("fp64"), torch.float64)


def test_the_guides_example_is_short_and_exact_in_the_engine(my_memory, fp64):
    assert len(my_memory.splitlines()) < 30
    memory = MemoryConfig(**written() | {"args": {"window": 2, "turns": 2}})
    requests = random_requests(fp64, memory, 4, seed=3, low=9)
    logs = run(fp64, requests)
    assert differences(fp64, logs, requests).max() <= FP64_BAR
    stayed = left = 0
    for log in logs:
        answered = np.isin(log.turn, np.unique(log.turn[log.kind == Kind.RESPONSE]))
        old = (log.turn < log.num_turns - 2) & np.isin(log.kind, (Kind.THINK, Kind.SCAFFOLD))
        alive = log.expiry >= len(log)
        assert (alive[old] == answered[old]).all()
        stayed, left = stayed + int(alive[old].sum()), left + int((~alive[old]).sum())
    assert stayed > 20
    assert left > 20


def test_the_guides_command_line_composes_and_says_what_it_is(my_memory):
    (command,) = blocks(GUIDE, "bash")
    overrides = [part.strip("'") for part in re.findall(r"'[^']*'|\S+", command)][2:]
    config = composed(*overrides)
    assert config.memory == MemoryConfig(**written() | {"window": config.memory.window})
    made = make_policy(config.memory)
    assert (type(made).__name__, made.window, made.text_window) == ("KeepAnswers", 4, 8)
    assert make_policy(config.memory) is not made, "one for each stream"
    assert knobs(config.memory) == (("target", "my_memory:KeepAnswers"), ("args", '{"turns": 8, "window": 4}'))
    assert any(line.startswith("memory: my_memory:KeepAnswers(window=4, turns=8); ") for line in describe(config))
    assert streaming_settings(config)["memory"]["args"] == {"window": 4, "turns": 8}


def test_its_baseline_of_recent_turns_has_its_own_window(my_memory):
    memory = MemoryConfig(**written() | {"window": 20, "args": {"window": 3}})
    assert memory.recent() == MemoryConfig("recent_frames", 3)
    assert own(Nothing).recent() == MemoryConfig("recent_frames", MemoryConfig().window)
    assert MemoryConfig("text_memory", 5).recent() == MemoryConfig("recent_frames", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "my_memori:KeepAnswers"}, r"memory\.target='my_memori:KeepAnswers' cannot be loaded \(No module"),
        ({"target": "my_memory:KeepAll"}, r"memory\.target='my_memory:KeepAll' cannot be loaded"),
        ({"target": "my_memory"}, r"memory\.target='my_memory' with memory\.name=custom: .*package\.module:Class"),
        ({"target": "my_memory:np"}, r"memory\.target='my_memory:np' is of type module"),
        ({"target": "builtins:dict"}, r"memory\.target='builtins:dict' is no policy: derive a class"),
        ({"args": {"turn": 3}}, r"memory\.args\.turn=3: there is no such parameter; .* takes turns, window"),
        ({"args": {"turns": 0}}, r"memory\.args\.turns=0 must be at least 1"),
        ({"args": {"turns": "many"}}, r"memory\.args: my_memory:KeepAnswers\(turns='many'\) raised TypeError"),
    ],
)
def test_what_is_wrong_with_ones_own_policy_is_said_by_key(my_memory, change, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**written() | change)


class Nothing(MemoryPolicy):
    """Nothing leaves: the ground of the policies below that are wrong in one thing."""

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        return np.zeros(len(live), bool)


class FractionBound(Nothing):
    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        return fixed + turns * per_turn / 2


class OtherBound(Nothing):
    def max_live_tokens(self, tokens: int) -> int:
        return tokens


class NoWords(Nothing):
    @property
    def words(self) -> str:
        return self.text


class WordsMethod(Nothing):
    def words(self) -> str:
        return "a method"


class LanesByNumber(Nothing):
    lanes = 2


class WindowInWords(Nothing):
    window = "four"


class Raises(Nothing):
    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        return {}[start.turn]


class Begins(Nothing):
    lanes = Lanes.MEMORY

    def lane_one_begins(self, lane0: int, lane1: int) -> int:
        return lane0 / 2


def own(policy: type[MemoryPolicy]) -> MemoryConfig:
    return MemoryConfig("custom", target=f"{__name__}:{policy.__name__}")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (NoWords, r"target='\S+:NoWords': its words raised AttributeError: .* no attribute 'text'"),
        (WordsMethod, r"target='\S+:WordsMethod': its words is <bound method .*a property"),
        (LanesByNumber, r"target='\S+:LanesByNumber': its lanes is 2; it must be a streams\.memory\.Lanes"),
        (WindowInWords, r"target='\S+:WindowInWords': its window is 'four'; it must be a number of turns"),
    ],
)
def test_what_is_read_of_ones_own_policy_must_be_of_its_type(policy, message):
    with pytest.raises(ValueError, match=r"memory\." + message):
        own(policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FractionBound, r"FractionBound\.max_live_tokens returned \d+\.\d+ for .*whole number of tokens"),
        (OtherBound, r"OtherBound\.max_live_tokens raised TypeError: .*unexpected keyword argument.* \(\S+:\d+\)"),
    ],
)
def test_a_bound_that_is_none_is_refused_before_anything_starts(policy, message):
    with pytest.raises(ValueError, match="memory: " + message):
        check_memory_policy(replace(composed(), memory=own(policy)))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Raises, r"Raises\.leaving raised KeyError in turn 0: 0 \(.*test_custom_memory\.py:\d+\)"),
        (Begins, r"Begins\.lane_one_begins returned \d+\.\d+ for \(\d+, \d+\); it must be a position"),
    ],
)
def test_a_policy_that_fails_in_a_stream_is_named_with_its_line(fp64, policy, message):
    with pytest.raises(ValueError, match="memory: " + message):
        run(fp64, random_requests(fp64, own(policy), 1, seed=3, low=3))


def test_a_worker_that_cannot_import_it_says_so(my_memory, tmp_path, monkeypatch):
    memory = MemoryConfig(**written())
    checkpoint = build_tiny(tmp_path / "model", TinySpec(hidden=64, layers=1, mlp=64))
    setup = worker_setup(checkpoint, memory=memory)
    sys.modules.pop("my_memory", None)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"memory\.target='my_memory:.* \(in rollout worker 3: .* importable there, too"
    ):
        open_service(setup, worker=3)


class TooLittle(MemoryPolicy):
    """Keeps everything and says that it keeps next to nothing."""

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        return np.zeros(len(live), bool)

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        return fixed + 2 * per_turn


class Wrong(TooLittle):
    """Answers with what it was made with."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        return {"list": [False] * len(live), "int": np.zeros(len(live), int), "short": np.zeros(1, bool)}[self.answer]


def engine_with(backbone, name: str, **args):
    memory = MemoryConfig("custom", target=f"{__name__}:{name}", args=args)
    engine = Engine(backbone, kv_slots=4000, max_streams=1)
    engine.add(request(backbone, memory, random_turns(backbone, np.random.default_rng(0), 12), "s"))
    return engine


def test_a_stream_that_holds_more_than_its_policy_said_stops_with_the_numbers(fp64):
    engine = engine_with(fp64, "TooLittle")
    with pytest.raises(
        ValueError, match=r"stream s: memory \S+:TooLittle may hold \d+ tokens in turn \d+, .*\(\d+\): correct"
    ):
        run_to_the_end(engine)


@pytest.mark.parametrize(("answer", "given"), [("list", r"\[\]"), ("int", r"int64 \[0\]"), ("short", r"bool \[1\]")])
def test_a_policy_that_answers_something_else_is_told_what(fp64, answer, given):
    with pytest.raises(ValueError, match=rf"Wrong\.leaving returned {given} in turn 0; .* each of the 0 live tokens"):
        engine_with(fp64, "Wrong", answer=answer).step()


def test_every_policy_and_its_defaults_are_in_the_guide():
    text = (DOCS / GUIDE).read_text()
    for name in POLICIES:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        memory = composed(f"memory={name}", "experiment=none", "data.synthetic.window=20").memory
        for knob in memory.takes:
            assert re.search(rf"`{knob}` \({getattr(memory, knob)}\b", row), (name, knob)

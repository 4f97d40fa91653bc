"""Transcripts keep the clock that the scoring used, and one bad row costs itself: the evaluation's own code, without Ray.

Actors are the real RolloutService and Scorer in this process; only their transport is replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evals.heldout import Condition, EvalResult, evaluate
from evals.transcripts.page import main
from evals.transcripts.record import write_transcripts
from rewards.scorer import Scorer
from runtime.tracking.progress import Progress
from runtime.tracking.tracker import Tracker
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.data.dataset import load_tasks
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from tests.support.clips import solid, write_clip
from tests.support.configs import composed
from tests.support.service import open_service, worker_setup
from tests.support.transcripts import data_of

PRESETS = ("vst_7b", "thinkstream_qwen2_5_vl_3b", "none")
WAIT_S = 120


@dataclass
class Remote:
    """What `.remote` returns is the result itself."""

    run: Callable[..., Any]

    def options(self, **_: Any) -> Remote:
        return self

    def remote(self, *given: Any) -> Any:
        return self.run(*given)


class Here:
    """The part of runtime.cluster.session.Session that an evaluation uses."""

    def __init__(self, service: Any, scorer: Scorer) -> None:
        self.worker = SimpleNamespace(rollout=Remote(lambda task: service.submit(task).result(timeout=WAIT_S)))
        self.scorer = scorer
        self.crew = self

    def call(self, reference: Any, what: str) -> Any:
        return reference

    def score(self, jobs: Any, what: str) -> Any:
        return self.scorer.score(jobs)


def one_by_one(
    here: Here, items: Iterable[Any], send: Any, per_worker: int, what: str, name: Any, given_up: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Takes the place of runtime.cluster.spread.spread, with a worker that does not die."""
    for item in items:
        references = send(here.worker, item)
        yield item, references[0], references


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("model"), TinySpec(hidden=64, layers=2, mlp=128), seed=1, gain=2.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three rows: 620 s with and without an end, and 7.5 s without one. Answers are due near the end."""
    folder = tmp_path_factory.mktemp("rows")
    write_clip(folder / "long.mp4", np.concatenate([solid((40 + i % 9, 90, 90), 1, 28, 28) for i in range(620)]), 1)
    write_clip(folder / "short.mp4", np.concatenate([solid((40 + 9 * i, 90, 90), 1, 28, 28) for i in range(15)]), 2)
    rows = []
    for name, video, asked, due, end in (
        ("ended", "long.mp4", 600.5, 605.0, 620.0),
        ("endless", "long.mp4", 130.0, 500.0, None),
        ("brief", "short.mp4", 1.0, 6.2, None),
    ):
        row = {"id": name, "video": str(folder / video), "start": 0.0, "category": name}
        row["queries"] = [{"time": asked, "text": "which?"}]
        row["answers"] = [{"time": due, "text": "A", "kind": "choice"}]
        rows.append(row | ({} if end is None else {"end": end}))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(preset: str, data: Path, root: Path):
    given = [f"experiment={preset}", "data=jsonl", f"data.train={data}", f"data.heldout={data}", f"run_root={root}"]
    config = composed(*given, "data.format=auto", "tracking.enabled=false")
    small = replace(config.data.video, min_pixels=784, max_pixels=784)
    if not small.max_chunks:  # a constant chunk: few and long ones, for the test's sake
        small = replace(small, chunk_seconds=10.0)
    turns = max(config.data.max_turns, 62)
    config = replace(config, data=replace(config.data, video=small, max_turns=turns))
    return replace(config, layout=LayoutConfig(system_prompt="Watch.", think_budget=4, max_new_tokens=7))


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr("evals.heldout.spread", lambda here, *given: one_by_one(here, *given))


def evaluated(config, model: Path) -> tuple[Here, EvalResult]:
    """`evals.heldout.evaluate` over the rows, as a run loads them."""
    loaded = load_tasks(config.data.heldout, video=config.data.video, on_bad="raise")
    setup = worker_setup(
        model,
        layout=config.layout,
        memory=MemoryConfig("rcsm", 3),
        video=config.data.video,
        kv_slots=65536,
        monitor_every=0,
    )
    with closing(open_service(setup)) as service:
        here = Here(service, Scorer(config.reward))
        return here, evaluate(config, here, loaded.tasks, Condition("trained"), Progress(), "rl")


def written(config, here: Here, result: EvalResult) -> list[dict[str, Any]]:
    tracker = Tracker(config.tracking, config.root, "test")
    write_transcripts(config, here, {"rl": result}, ("rl",), tracker, Progress())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (config.root / "transcripts" / "rl.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("preset", PRESETS)
def test_turns_and_times_are_those_that_were_scored(preset, data, model, tmp_path, capsys):
    config = config_of(preset, data, tmp_path)
    here, result = evaluated(config, model)
    assert [stream.failed for stream in result.streams] == [None] * 3
    lines = {line["task"]: line for line in written(config, here, result)}
    assert "not written" not in capsys.readouterr().out
    assert lines.keys() == {"ended", "endless", "brief"}
    for stream in result.streams:
        task, line = stream.task, lines[stream.task.id]
        seconds = config.data.video.chunk_seconds_of(task)
        assert line["chunk_seconds"] == seconds
        assert line["end"] == (task.end if math.isfinite(task.end) else None)
        assert len(line["turns"]) == len(stream.turns)
        assert line["turns"][0]["start"] == 0.0
        assert line["turns"][0]["end"] == min(seconds, task.end)
        (answer,), (scored,) = line["answers"], stream.result.answers
        # The scorer's own account of the same answer.
        assert answer["due_turn"] == scored.due_turn == task.chunk_of(task.answers[0].time, seconds)
        assert answer["query_turn"] == task.chunk_of(task.queries[0].time, seconds)
        assert [t["turn"] for t in line["turns"] if t["queries"]] == [answer["query_turn"]]
        assert answer["window"], "the due turn is one of the stream's turns"
        assert answer["window"][0][0] <= answer["due_turn"] < len(line["turns"])
        for turn in line["turns"]:
            assert all(turn["start"] <= time <= turn["start"] + seconds for time in turn["video"]["frame_times"])
    if preset == "vst_7b":
        assert (lines["ended"]["chunk_seconds"], lines["ended"]["answers"][0]["due_turn"]) == (124.0, 4)
        assert lines["brief"]["chunk_seconds"] == 31.0
    page = data_of(config.root / "transcripts" / "rl.html")
    shown = {stream["task"]: stream for stream in page["streams"]}
    assert {task: stream["end"] for task, stream in shown.items()} == {
        task: line["end"] for task, line in lines.items()
    }
    assert {task: stream["chunk_seconds"] for task, stream in shown.items()} == {
        task: line["chunk_seconds"] for task, line in lines.items()
    }
    # Thumbnails of the chunks that the model saw, for every turn where they fit.
    assert len(shown["brief"]["frames"]) == len(lines["brief"]["turns"])
    assert "no frames" not in "".join(stream["frames_note"] for stream in page["streams"])
    # And again from the file alone.
    again = config.root / "again.html"
    assert main([str(again), str(config.root / "transcripts" / "rl.jsonl")]) == 0
    assert {s["task"]: s["end"] for s in data_of(again)["streams"]} == {
        task: line["end"] for task, line in lines.items()
    }


def test_one_bad_stream_costs_its_own_transcript_and_is_named(data, model, tmp_path, capsys):
    config = config_of("none", data, tmp_path)
    here, result = evaluated(config, model)
    first, second, third = result.streams
    # A log that is lost, and a number that is none.
    lost = replace(first, payload=SimpleNamespace(logs=()))
    odd = replace(second, result=replace(second.result, total=math.nan))
    lines = written(config, here, replace(result, streams=(lost, odd, third)))
    said = capsys.readouterr().out
    assert {line["task"]: line["reward"] for line in lines} == {"endless": None, "brief": third.result.total}
    assert "rl: no transcript of ended: IndexError" in said
    assert "not written" not in said
    assert {stream["task"] for stream in data_of(config.root / "transcripts" / "rl.html")["streams"]} == {
        "endless",
        "brief",
    }


def test_the_quickstarts_own_clips_keep_their_clock(model, tmp_path):
    made = generate(tmp_path / "data", SyntheticConfig(train_clips=1, heldout_per_mode=1))
    config = config_of("none", made.heldout_jsonl, tmp_path / "run")
    here, result = evaluated(config, model)
    for line in written(config, here, result):
        assert line["chunk_seconds"] == config.data.video.chunk_seconds
        assert line["turns"][-1]["end"] <= line["end"]

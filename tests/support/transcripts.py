"""Real logs for the transcript tests: scripted streams written by the rollout service, one rolled out by its engine.

What every stream says is scripted, so that each outcome of an answer occurs; clips are real files, memory is the policy's.
"""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.heldout import EvalResult, ScoredStream, collect
from evals.transcripts.page import write_page
from evals.transcripts.record import record
from rewards.compose import Reward, RewardResult
from rewards.outcome import StreamOutcome
from rewards.scripted import silent_turns
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig
from streams.log.record import StreamLog
from streams.memory import MemoryConfig
from streams.messages import RolloutTask, ScriptedTurn, ScriptTask
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery
from streams.video.config import VideoConfig
from tests.support.clips import solid, write_clip
from tests.support.configs import reward_preset
from tests.support.service import open_service, worker_setup

CHUNK = 1.0
WINDOW = 3
LONG = 500
VIDEO = VideoConfig(min_pixels=784, max_pixels=56 * 56)
HOSTILE = """</script><img src=x onerror="window.pwned=1"><svg onload='window.pwned=2'>&lt;b&gt;{{data}}"""
COLOURS = ((200, 40, 40), (40, 160, 70), (50, 80, 210), (225, 205, 60))
REWARD = Reward.from_config(reward_preset("quickstart"))


@dataclass(frozen=True)
class Made:
    """A result's streams with their logs (None for one that could not be run)."""

    streams: tuple[ScoredStream, ...]
    logs: tuple[StreamLog | None, ...]

    def records(self, name: str) -> list[dict]:
        return [record(name, s, log, REWARD.timing) for s, log in zip(self.streams, self.logs, strict=True)]

    def result(self) -> EvalResult:
        return collect("trained", self.streams)


def write_seconds(path: Path, seconds: int) -> Path:
    """Write a clip that changes its colour every second."""
    frames = np.concatenate([solid(COLOURS[i % len(COLOURS)], 2, 56, 72) for i in range(seconds)])
    write_clip(path, frames, 2)
    return path


def one_question(folder: Path, name: str, category: str, text: str = "What colour comes now?") -> StreamTask:
    """Return a task of 12 turns with one question, asked in turn 2 and due in turn 6."""
    return StreamTask(
        id=name,
        video=str(write_seconds(folder / f"{len(list(folder.glob('*.mp4')))}.mp4", 12)),
        start=0.0,
        end=12.0,
        queries=(TimedQuery(2.25, text),),
        answers=(ExpectedAnswer(6.25, "red"),),
        category=category,
    )


def long_stream(folder: Path) -> StreamTask:
    asked = (10, 120, 300, 470)
    return StreamTask(
        id="long-0",
        video=str(write_seconds(folder / "long.mp4", LONG)),
        start=0.0,
        end=float(LONG),
        queries=tuple(TimedQuery(t + 0.25, f"What happens after {t} seconds?") for t in asked),
        answers=tuple(ExpectedAnswer(t + 8.25, "green", query=i) for i, t in enumerate(asked)),
        category="Koch: Schritt/1",
    )


def script(turns: int, says: dict[int, str], thought: str = "nothing new") -> tuple[ScriptedTurn, ...]:
    return tuple(ScriptedTurn(f"{thought} {t}", says.get(t)) for t in range(turns))


def make(folder: Path) -> dict[str, Made]:
    """Make the results `rl`, `sft` and `recent_frames`. The clip of stream gone-0 is deleted at the end."""
    folder.mkdir()
    alert, recall = one_question(folder, "alert-0", "alert"), one_question(folder, "recall-0", "recall")
    now, early = one_question(folder, "now-0", "now"), one_question(folder, "now-1", "now")
    hostile, gone = one_question(folder, "hostile-0", HOSTILE, HOSTILE), one_question(folder, "gone-0", "recall")
    failed, endless = one_question(folder, "failed-0", ""), long_stream(folder)
    setup = worker_setup(
        build_tiny(folder / "model", TinySpec(hidden=64, layers=2, mlp=128), seed=1, gain=2.0),
        layout=LayoutConfig(system_prompt="Watch.", think_budget=150, max_new_tokens=180),
        memory=MemoryConfig("rcsm", WINDOW),
        video=VIDEO,
        max_streams=4,
        kv_slots=16384,
        monitor_every=0,
        run_seed=5,
    )
    with closing(open_service(setup)) as service:

        def scripted(task: StreamTask, says: dict[int, str], thought: str = "nothing new"):
            turns = LONG if task is endless else 12
            request = ScriptTask(f"0/{task.id}", task, Plan(turns, CHUNK), script(turns, says, thought))
            return _scored(task, *service.script(request).result(timeout=120))

        replies = {118: "green", 128: "blue", 312: "green", 480: "green"}
        rl = [
            scripted(alert, {6: "red"}, "now answer red"),
            scripted(recall, {6: "blue", 9: "red"}),
            scripted(now, {}),
            scripted(early, {4: "red"}),
            scripted(hostile, {6: HOSTILE}, HOSTILE),
            scripted(gone, {6: "red"}),
            (_failed(failed), None),
            scripted(endless, replies, "a yellow square on grey"),
        ]
        sft = [scripted(alert, {8: "red"}), scripted(recall, {7: "red"}), scripted(now, {6: "red"})]
        short = RolloutTask("0/engine", alert, Plan(12, 1.0), 1, 0.0, memory=MemoryConfig("recent_frames", 2))
        rolled = [_scored(alert, *service.submit(short).result(timeout=120))]
    Path(gone.video).unlink()
    return {
        name: Made(*zip(*streams, strict=True))
        for name, streams in (("rl", rl), ("sft", sft), ("recent_frames", rolled))
    }


def build_page(folder: Path, budget_mb: float = 8.0) -> Path:
    """Write the page of `make`'s results."""
    results = make(folder / "streams")
    path = folder / "rl.html"
    totals = {name: (made.result().n, len(made.streams), made.result().reward) for name, made in results.items()}
    write_page(path, {name: made.records(name) for name, made in results.items()}, VIDEO, budget_mb, totals)
    return path


def _scored(task: StreamTask, summary, payload) -> tuple[ScoredStream, StreamLog]:
    assert summary.failed is None, summary.failed
    result = REWARD(StreamOutcome(task, summary.turns[0], CHUNK))
    return ScoredStream(task, Plan(len(summary.turns[0]), CHUNK), summary.turns[0], result, payload), payload.logs[0]


def _failed(task: StreamTask) -> ScoredStream:
    silent = silent_turns(12)
    result: RewardResult = REWARD(StreamOutcome(task, silent, CHUNK))
    return ScoredStream(task, Plan(12, CHUNK), silent, result, None, "VideoError: no such file")


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])

"""Closing a reader, or the service that owns it, while another thread reads: real processes, real clips."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rollout.promises import Promises, ServiceClosedError
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.messages import RolloutTask, ScriptedTurn, ScriptTask
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery
from streams.video.config import VideoConfig
from streams.video.reader import ClipReader, ReaderClosedError
from tests.support.clips import write_clip, write_endless, write_grey_ramp
from tests.support.commands import launch
from tests.support.service import open_service, worker_setup

CLIP_SECONDS = 30
PROMPT_S = 10.0
"""How long `close` may take where every core is busy (0.1 s where none is): half of what a stuck decode takes."""
WAIT_S = 60.0


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory) -> str:
    """30 s in 1280x720, a still: a small file that takes a second or more to read."""
    noise = np.random.default_rng(0).integers(0, 255, (1, 720, 1280, 3), np.uint8)
    path = tmp_path_factory.mktemp("films") / "long.mp4"
    write_clip(path, np.broadcast_to(noise, (CLIP_SECONDS * 24, *noise.shape[1:])), 24)
    return str(path)


def children(states: str = "RSDZTtXIP") -> set[int]:
    """Processes of ours in one of the states (as in /proc/PID/stat): by default those that run or wait to be reaped."""
    own = str(os.getpid())
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if fields[1] == own and fields[0] in states:
            found.add(int(entry.name))
    return found


def ended(others: set[int]) -> bool:
    """Whether every process of ours but `others` ends, in its own time; to be reaped is ended."""
    give_up = time.monotonic() + WAIT_S
    while children("RSD") - others and time.monotonic() < give_up:
        time.sleep(0.05)
    return not children("RSD") - others


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def closed_while_reading(
    reader: ClipReader, video: str, delay_s: float, chunks: int = CLIP_SECONDS
) -> tuple[str, float]:
    """How a read ended that was cut off after `delay_s`, and how long `close` took. Any other error passes through."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, video, 0.0, float(chunks), chunks)
        time.sleep(delay_s)
        began = time.monotonic()
        reader.close()
        took = time.monotonic() - began
        error = reading.exception(timeout=PROMPT_S)
        if error is None:
            return "read", took
        assert isinstance(error, ReaderClosedError)
        assert video in str(error)
        return "closed", took


def stress(video: str, repetitions: int, seed: int) -> list[str]:
    config = VideoConfig(min_pixels=1, max_pixels=200 * 200)
    closed_while_reading(ClipReader(config), video, 0.2)  # whatever is opened once
    before, open_before = children(), descriptors()
    chance = random.Random(seed)
    ends = []
    for _ in range(repetitions):
        reader = ClipReader(config)
        if chance.random() < 0.5:  # the process is there: the close hits the decoding, not the start
            reader.duration(video)
        end, took = closed_while_reading(reader, video, chance.uniform(0.0, 1.0))
        assert took < PROMPT_S
        assert reader.child_pid is None
        assert children() == before
        ends.append(end)
    assert descriptors() == open_before
    return ends


def test_a_close_ends_the_read_of_another_thread_and_leaves_nothing(long_clip):
    assert stress(long_clip, 10, seed=1).count("closed") >= 3


@pytest.mark.slow
def test_a_close_at_any_moment_of_a_read(long_clip):
    ends = stress(long_clip, 60, seed=2)
    assert ends.count("closed") >= 20


def test_a_stuck_decode_does_not_hold_up_a_close(tmp_path):
    write_endless(tmp_path / "stuck.mp4")
    reader = ClipReader(VideoConfig())
    reader.duration(str(write_grey_ramp(tmp_path / "good.mp4", 8, 4)))
    end, took = closed_while_reading(reader, str(tmp_path / "stuck.mp4"), 0.3, chunks=2)
    assert end == "closed"
    assert took < PROMPT_S


def test_a_closed_reader_stays_closed(tmp_path):
    good = str(write_grey_ramp(tmp_path / "good.mp4", 8, 4))
    reader = ClipReader(VideoConfig())
    reader.read(good, 0, 2, 2)
    for _ in range(2):
        reader.close()
        with pytest.raises(ReaderClosedError, match=r"closed before .*good\.mp4 was read"):
            reader.read(good, 0, 2, 2)
        with pytest.raises(ReaderClosedError):
            reader.duration(good)
    assert reader.child_pid is None


def test_reads_of_several_threads_take_turns_and_all_end_with_the_reader(tmp_path, long_clip):
    good = str(write_grey_ramp(tmp_path / "good.mp4", 8, 4))
    with ClipReader(VideoConfig()) as reader, ThreadPoolExecutor(6) as pool:
        clips = list(pool.map(lambda _: reader.read(good, 0, 2, 2), range(6)))
        assert all(np.array_equal(clip.frames, clips[0].frames) for clip in clips)
        pending = [pool.submit(reader.read, long_clip, 0.0, 30.0, 30) for _ in range(6)]
        time.sleep(0.1)
        closers = [pool.submit(reader.close) for _ in range(2)]
        reader.close()
        assert [type(future.exception(timeout=PROMPT_S)) for future in pending].count(ReaderClosedError) >= 5
        assert [future.exception(timeout=PROMPT_S) for future in closers] == [None, None]


class _Stop(BaseException):
    """As Ctrl-C or SIGTERM come: out of a signal handler."""


@pytest.mark.parametrize("delay_s", [0.02, 0.1, 0.8])
def test_an_interrupt_in_a_read_leaves_no_process(long_clip, delay_s):
    def handler(signum, frame):
        raise _Stop

    before, open_before = children(), descriptors()
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(_Stop), ClipReader(VideoConfig()) as reader:  # noqa: PT012 - the interrupt may come anywhere
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            while True:
                reader.read(long_clip, 0.0, 30.0, 30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    # One cut off between its fork and its first words is not known yet to anybody: it ends as its pipe has no other end.
    assert ended(before)
    assert descriptors() == open_before


# ---- the service that owns a reader ----


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    checkpoint = build_tiny(tmp_path_factory.mktemp("model"), TinySpec(hidden=64, layers=2, mlp=128), seed=1, gain=2.0)
    return worker_setup(checkpoint)


def task_of(video: str, name: str, turns: int) -> StreamTask:
    return StreamTask(
        id=name,
        video=video,
        queries=(TimedQuery(0.0, "which?"),),
        answers=(ExpectedAnswer(0.5, "A", "choice"),),
        start=0.0,
        end=float(turns),
    )


def demonstration(video: str, name: str, turns: int) -> ScriptTask:
    return ScriptTask(
        name, task_of(video, name, turns), Plan(turns, 1.0), tuple(ScriptedTurn("", None) for _ in range(turns))
    )


@pytest.mark.parametrize("kind", ["script", "rollout"])
def test_a_stage_change_in_the_middle_of_a_read(setup, long_clip, tmp_path, kind):
    """Nothing fails, nothing is dropped: what was under way or waited ends in ServiceClosedError."""
    good = str(write_grey_ramp(tmp_path / "good.mp4", 8, 4))
    before = children()
    for delay_s in (0.0, 0.15, 0.5):
        service = open_service(setup)
        assert service.script(demonstration(good, "first", 2)).result(timeout=WAIT_S)[0].failed is None
        names = ["0/a", "0/b", "0/c"]
        if kind == "script":
            futures = [service.script(demonstration(long_clip, name, CLIP_SECONDS)) for name in names]
        else:
            tasks = [task_of(long_clip, name, CLIP_SECONDS) for name in names]
            futures = [service.submit(RolloutTask(t.id, t, Plan(CLIP_SECONDS, 1.0), 2, 1.0)) for t in tasks]
        time.sleep(delay_s)
        began = time.monotonic()
        service.close()
        assert time.monotonic() - began < PROMPT_S
        for name, future in zip(names, futures, strict=True):
            error = future.exception(timeout=PROMPT_S)
            assert isinstance(error, ServiceClosedError)
            assert name in str(error)
        with pytest.raises(ServiceClosedError, match="0/late was asked for"):
            service.script(demonstration(good, "0/late", 2))
        service.close()
    assert children() == before
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("engine", "prepare"))]


def test_streams_under_way_end_with_the_service(setup, tmp_path):
    good = str(write_grey_ramp(tmp_path / "good.mp4", 100, 4))
    service = open_service(setup)
    task = task_of(good, "0/long", 25)
    future = service.submit(RolloutTask(task.id, task, Plan(25, 1.0), 8, 1.0))
    give_up = time.monotonic() + WAIT_S
    while not service.engine.busy and time.monotonic() < give_up:
        time.sleep(0.002)
    service.close()
    assert isinstance(future.exception(timeout=PROMPT_S), ServiceClosedError)


def test_a_promise_is_settled_once():
    promises = Promises("worker 3")
    kept, cancelled, cut = (promises.make(name) for name in ("one", "two", "three"))
    promises.settle(kept, 1)
    promises.settle(kept, 2)
    cancelled.cancel()
    promises.settle(cancelled, 3)
    promises.cut_off()
    promises.settle(cut, 4)
    assert kept.result(timeout=0) == 1
    assert cancelled.cancelled()
    with pytest.raises(ServiceClosedError, match="worker 3 was closed before three was done"):
        cut.result(timeout=0)
    with pytest.raises(ServiceClosedError, match="before four was asked for"):
        promises.make("four")
    assert isinstance(cut, Future)


# ---- a whole run ----


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_from_its_cold_start_to_rl_while_clips_are_read(tmp_path, long_clip):
    """One SFT step of two clips: at its end the workers still read those laid out ahead, two batches of them."""
    rows = []
    for i in range(8):
        video = tmp_path / f"{i}.mp4"  # a file of its own each: nothing comes from the cache
        os.link(long_clip, video)
        query, answer = {"time": 0.0, "text": "which?"}, {"time": 2.5, "text": "A", "kind": "choice"}
        rows.append(
            {"id": f"r{i}", "video": str(video), "start": 0, "end": 30, "queries": [query], "answers": [answer]}
        )
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = launch(
        "job=all",
        "job.stages=[sft,rl]",
        "experiment=none",
        f"run_root={tmp_path / 'run'}",
        "resume=never",
        "data=jsonl",
        f"data.train={data}",
        f"data.heldout={data}",
        "data.video.min_pixels=784",
        "data.video.max_pixels=784",
        "memory.window=4",
        "layout.system_prompt='Watch.'",
        "layout.think_budget=6",
        "layout.max_new_tokens=10",
        "model.tiny.hidden=64",
        "model.tiny.layers=2",
        "model.tiny.mlp=128",
        "sft.steps=1",
        "sft.batch=2",
        "algorithm.steps=1",
        "algorithm.groups_per_step=1",
        "algorithm.group_size=2",
        "algorithm.groups_in_flight=2",
        "weights.max_lag=1",
        "rollout.workers=2",
        "tracking.enabled=false",
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    assert "Traceback" not in said
    assert "Unhandled error" not in said
    assert "skipped" not in said
    assert "dropped" not in said

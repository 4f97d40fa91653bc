"""ThinkStream tasks through the rollout worker's real code: streams that end with their video, chunks by duration."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from conf.training import SftConfig
from sft.demonstrations import script_for
from streams.data.dataset import load_tasks
from streams.messages import RolloutTask, ScriptedTurn, ScriptTask
from streams.task import Plan
from tests.support.clips import write_grey_ramp
from tests.support.service import WAIT_S, open_service, roll

pytestmark = pytest.mark.slow
TAIL = 3


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two questions about a video of 10 s: answered early, and so late that its tail passes the end."""
    folder = tmp_path_factory.mktemp("records")
    write_grey_ramp(folder / "ten.mp4", 80, 8)
    rows = []
    for answer in (4.2, 8.5):
        talk = [{"role": "user", "content": "Say B."}, {"role": "assistant", "content": "B", "timestamp": answer}]
        thoughts = [{"think": "B", "timestamp": 0.5}, {"think": "A", "timestamp": 1.5}]
        rows.append({"video_path": "ten.mp4", "conversations": talk, "thoughts": thoughts})
    path = folder / "records.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def demonstration(task, turns, chunk):
    plan = Plan(turns, chunk)
    return ScriptTask(f"0/{task.id}", task, plan, script_for(task, plan, SftConfig(), seed=0, epoch=0))


def test_a_stream_of_unknown_length_ends_with_its_tail_or_its_video(setup, records):
    early, late = load_tasks(records, on_bad="raise").tasks
    turns = [task.num_turns(1.0, TAIL, 100) for task in (early, late)]
    assert turns == [8, 12]
    service = open_service(setup)
    try:
        for task, asked, shown in ((early, 8, 8), (late, 12, 10)):
            summary, payload = roll(service, RolloutTask(f"0/{task.id}", task, Plan(asked, 1.0), 2, 1.0))
            assert summary.failed is None
            assert [len(stream) for stream in summary.turns] == [shown] * 2
            assert payload.media.shape[0] == shown
            assert summary.clip_seconds == asked
            summary, payload = service.script(demonstration(task, asked, 1.0)).result(timeout=WAIT_S)
            assert summary.failed is None
            said = [turn.response for turn in summary.turns[0]]
            due = int(task.answers[0].time)
            assert said == [None] * due + ["B"] + [None] * (shown - due - 1)
        # A demonstration that speaks where there is no video is refused by name.
        silent = ScriptedTurn("", None)
        script = ScriptTask("1/x", late, Plan(12, 1.0), (*[silent] * 11, ScriptedTurn("", "B")))
        summary, payload = service.script(script).result(timeout=WAIT_S)
        assert payload is None
        assert "speaks after the video's end, which comes in turn 9" in summary.failed
    finally:
        service.close()


def test_chunks_by_duration_reach_frames_queries_thoughts_and_positions(setup, records):
    """10 s in at most 5 chunks: chunks of 2 s, the answer at 8.5 s due in chunk 4, both thoughts in chunk 0."""
    video = replace(setup.video, max_chunks=5)
    _, task = load_tasks(records, on_bad="raise", video=video).tasks
    chunk = video.chunk_seconds_of(task)
    assert (task.end, chunk) == (10.0, 2.0)
    turns = task.num_turns(chunk, TAIL, 100)
    assert turns == 5
    by_duration = open_service(replace(setup, video=video))
    constant = open_service(replace(setup, video=replace(video, chunk_seconds=2.0, max_chunks=0)))
    try:
        script = demonstration(task, turns, chunk)
        assert script.script[0] == ScriptedTurn("B A", None)
        (log,) = by_duration.script(script).result(timeout=WAIT_S)[1].logs
        (same,) = constant.script(script).result(timeout=WAIT_S)[1].logs
        assert [chunk.frame_times for chunk in log.chunks] == [(0.5 + 2 * t, 1.5 + 2 * t) for t in range(5)]
        assert np.array_equal(log.ids, same.ids)
        assert np.array_equal(log.positions, same.positions)
        assert by_duration.script(script).result(timeout=WAIT_S)[0].turns[0][4].response == "B"
    finally:
        by_duration.close()
        constant.close()

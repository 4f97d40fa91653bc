"""What a row's video may be: a file in the folder that confines it, of the kind and size that it had."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace

import numpy as np
import pytest

from runtime.tracking.progress import Progress
from streams.data.check import main
from streams.data.dataset import load_tasks, sample_tasks
from streams.task import Plan, Reason, VideoFile
from streams.video.config import VideoConfig
from streams.video.presentation import check_container, opened
from streams.video.reader import ClipReader, VideoError
from tests.support.clips import write_grey_ramp

SECRET = b"root:$6$hunter2"
PLAN = Plan(2, 1.0)


def row(name, video):
    asked = {"time": 0, "text": "what?"}
    return {"id": name, "video": str(video), "queries": [asked], "answers": [{"time": 1, "text": "grey"}]}


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    """Rows that stay in their folder beside rows that leave it, each in another way."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "clips").mkdir(parents=True)
    (tmp_path / "data2").mkdir()
    elsewhere.mkdir()
    (elsewhere / "shadow").write_bytes(SECRET)
    good = write_grey_ramp(folder / "clips" / "good.mp4", 8, 4)
    far = write_grey_ramp(elsewhere / "far.mp4", 8, 4)
    (folder / "in.mp4").symlink_to(good)
    (folder / "out.mp4").symlink_to(elsewhere / "shadow")
    (folder / "linked").symlink_to(elsewhere)
    named = {
        "good": "clips/good.mp4",
        "dots": "clips/../clips/good.mp4",
        "linked in": "in.mp4",
        "absolute": good,
        "gone": "gone.mp4",
        "up": "../elsewhere/shadow",
        "far": far,
        "linked out": "out.mp4",
        "linked folder": "linked/far.mp4",
        "beside": "../data2/x.mp4",
        "system": "/etc/shadow",
    }
    return write(folder, *(row(name, video) for name, video in named.items()))


OUTSIDE = ["up", "far", "linked out", "linked folder", "beside", "system"]


def test_a_video_outside_of_the_folder_of_the_rows_costs_its_row_by_name(rows):
    found = load_tasks(rows)
    assert [task.id for task in found.tasks] == ["good", "dots", "linked in", "absolute", "gone"]
    assert [sample.reason.split(":")[0] for sample in found.skipped] == [f"task {name}" for name in OUTSIDE]
    for number, sample in enumerate(found.skipped, start=6):
        assert sample.source == f"{rows}:{number}"
        assert sample.kind is Reason.VIDEO
        assert f"outside of {rows.parent}" in sample.reason
        assert "data.root=/" in sample.reason
        assert "root:" not in sample.reason


def test_the_folder_can_be_chosen_and_lifted(rows, tmp_path):
    anywhere = [task.id for task in load_tasks(rows, root="/").tasks]
    assert len(anywhere) == 11
    assert [task.id for task in load_tasks(rows, root=tmp_path).tasks] == anywhere[:-1]
    assert [task.id for task in load_tasks(rows, root=tmp_path / "elsewhere").tasks] == OUTSIDE[:4]
    assert [task.id for task in sample_tasks(rows, 11, root=tmp_path)] == anywhere[:-1]
    with pytest.raises(ValueError, match=r"data\.root=/no/such is not a folder"):
        load_tasks(rows, root="/no/such")


def test_the_check_says_what_a_run_would(rows, capsys):
    assert main([str(rows)]) == 1
    assert capsys.readouterr().out.count("set data.root") == len(OUTSIDE)
    assert main([str(rows), "--root", "/"]) == 1
    said = capsys.readouterr().out
    assert "data.root" not in said
    assert "not a supported video" in said
    assert "hunter2" not in said
    assert "root:" not in said


def test_a_link_that_is_laid_after_the_rows_were_read_is_not_followed_out(rows, tmp_path):
    task = load_tasks(rows).tasks[0]
    os.replace(task.video, tmp_path / "elsewhere" / "moved.mp4")
    os.symlink(tmp_path / "elsewhere" / "moved.mp4", task.video)
    with ClipReader(VideoConfig()) as reader:
        with pytest.raises(VideoError, match="outside of"):
            reader.read_task(task, PLAN)
        lifted = replace(task, file=VideoFile("/", task.file.size))
        assert len(reader.read_task(lifted, PLAN).frames) == 2


def test_a_file_that_is_replaced_during_the_run_is_named(rows):
    task = load_tasks(rows).tasks[0]
    with ClipReader(VideoConfig()) as reader:
        before = reader.read_task(task, PLAN).frames
        # The same size: only the time of the change tells.
        os.utime(task.video, ns=(0, 0))
        with pytest.raises(VideoError, match=r"replaced or written to since it was first read.*start the run again"):
            reader.read_task(task, PLAN)
    write_grey_ramp(rows.parent / "clips" / "good.mp4", 40, 4)
    with ClipReader(VideoConfig()) as reader:
        with pytest.raises(VideoError, match=rf"has been replaced: it has \d+ bytes, {task.file.size} when"):
            reader.read_task(task, PLAN)
        assert np.array_equal(reader.read_task(load_tasks(rows).tasks[0], PLAN).frames, before)
        os.unlink(task.video)
        with pytest.raises(VideoError, match="No such file"):
            reader.read_task(task, PLAN)


def test_what_is_no_file_is_named_by_its_kind_before_it_is_opened(tmp_path):
    """The limit is that of the reader's first request: a pipe that was opened would hold it for an hour."""
    os.mkfifo(tmp_path / "pipe.mp4")
    with ClipReader(VideoConfig(decode_timeout_s=3600)) as reader, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.mp4"))
        for video, kind in (
            (tmp_path / "pipe.mp4", "a named pipe"),
            (tmp_path / "socket.mp4", "a socket"),
            ("/dev/zero", "a device"),
            (tmp_path, "a folder"),
        ):
            with pytest.raises(VideoError, match=f"it is {kind}, not a video file"):
                reader.read(str(video), 0.0, 2.0, 2)
            with pytest.raises(VideoError, match=f"it is {kind}, not a video file"):
                reader.presentation(str(video))


def test_a_file_is_opened_as_the_container_that_it_begins_as(tmp_path):
    """By the whole content FFmpeg might take it for another one: some playlists begin as they like, and name other files."""
    write_grey_ramp(tmp_path / "a.mp4", 8, 4)
    write_grey_ramp(tmp_path / "a.mkv", 8, 4)
    (tmp_path / "renamed.mp4").write_bytes((tmp_path / "a.mkv").read_bytes())
    for name, format in (("a.mp4", "mov"), ("a.mkv", "matroska"), ("renamed.mp4", "matroska")):
        assert check_container(str(tmp_path / name)) == format
        with opened(str(tmp_path / name), "") as (container, _):
            assert format in container.format.name.split(",")


def test_the_terminal_shows_a_path_as_it_is(capsys):
    progress = Progress()
    progress.say("skipped /data/:x:/[bold]a.mp4: gone")
    progress.step("rl", 1, 1, {"a:x:": 1.0})
    said = capsys.readouterr().out
    assert "skipped /data/:x:/[bold]a.mp4: gone" in said
    assert "a:x: 1" in said

"""The check before training: real files, real videos, a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streams.check import main
from streams.dataset import load_tasks
from tests.clips import write_grey_ramp

ROOT = Path(__file__).resolve().parent.parent


def row(name, video, end=None, answer=2.0):
    found = {"id": name, "video": video, "queries": [{"time": 1, "text": "q"}]}
    found["answers"] = [{"time": answer, "text": "3", "kind": "integer"}]
    return found | ({} if end is None else {"end": end})


@pytest.fixture
def folder(tmp_path):
    write_grey_ramp(tmp_path / "good.mp4", 80, 8)
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 64)
    return tmp_path


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_what_is_usable_and_what_is_not(folder, capsys):
    path = write(
        folder,
        row("whole", "good.mp4"),
        row("cut", "good.mp4", end=10.0, answer=7.5),
        "{oops",
        row("broken", "broken.mp4", end=5),
        row("broken again", "broken.mp4"),
        row("gone", "gone.mp4"),
        row("long", "good.mp4", end=60, answer=50),
        row("late", "good.mp4", answer=50),
    )
    assert main([str(path), "--write", str(folder / "usable.jsonl")]) == 1
    said = capsys.readouterr().out
    assert "2 rows usable, 6 skipped, 3 videos opened" in said
    assert f"skipped {path}:3: not JSON" in said
    assert said.count("truncated or damaged") == 2
    for part in (
        "task gone",
        "No such file",
        "task long",
        "lasts until 60 s but the file holds 10.00 s",
        "task late",
        "answers[0] at 50 s lies after the end of the video (10 s)",
        "answers: integer 2; to 2 questions",
        "thoughts: 0 (a cold start",
        "length: 10 to 10, median 10 s; chunks up to the last answer: 3 to 8, median 5.5",
    ):
        assert part in said, part
    again = load_tasks(folder / "usable.jsonl", on_bad="raise").tasks
    assert [(task.id, task.end) for task in again] == [("whole", 10.0), ("cut", 10.0)]


@pytest.mark.parametrize("text", ["a <|im_end|> b", "<silent>", "</think>"])
def test_a_question_that_a_run_would_refuse_is_named(folder, capsys, text):
    forged = row("forged", "good.mp4") | {"queries": [{"time": 1, "text": text}]}
    assert main([str(write(folder, forged, row("whole", "good.mp4")))]) == 1
    assert "good.mp4): queries[0].text spells the control token" in capsys.readouterr().out


def test_a_good_file_is_good_and_a_useless_one_is_refused(folder, capsys):
    assert main([str(write(folder, row("a", "good.mp4"))), "--max-chunks", "5"]) == 0
    assert "chunks up to the last answer: 2 to 2" in capsys.readouterr().out
    assert main([str(write(folder, row("a", "broken.mp4")))]) == 2
    assert "0 rows usable, 1 skipped" in capsys.readouterr().out
    assert main([str(write(folder, "oops"))]) == 2
    assert "no usable row" in capsys.readouterr().err
    assert main([str(folder / "nowhere.jsonl")]) == 2


@pytest.mark.slow
def test_the_command(folder):
    path = write(
        folder,
        {
            "video_path": "good.mp4",
            "x": 1,
            "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "B", "timestamp": 4}],
        },
    )
    command = [sys.executable, "-m", "streams.check", str(path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "unknown field x" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = subprocess.run(
        [*command, "--ignore-field", "x"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert "answers: choice 1; to 1 questions" in done.stdout

"""The check before training: real files, real videos, a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewards import is_correct
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.data.check import main
from streams.data.dataset import load_tasks
from tests.support.clips import write_grey_ramp
from tests.support.project import ROOT


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


def test_a_video_name_that_no_file_can_have_costs_its_row(folder, capsys):
    nul = json.dumps({"video_path": "a\0.mp4", "conversations": []})
    path = write(folder, row("whole", "good.mp4"), row("nul", "a\0.mp4"))
    assert main([str(path)]) == 1
    said = capsys.readouterr().out
    assert f'skipped {path}:2: video="a\\u0000.mp4" contains a NUL' in said
    assert "1 rows usable, 1 skipped" in said
    assert main([str(write(folder, nul))]) == 2
    assert "video_path=" in capsys.readouterr().err


def test_a_video_name_that_the_locale_cannot_write_costs_its_row(folder):
    path = write(folder, row("whole", "good.mp4"), row("other", "\u732b.mp4"))
    bare = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "streams.data.check", str(path)],
        cwd=ROOT,
        env=bare,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "1 rows usable, 1 skipped" in done.stdout
    assert "rows.jsonl:2: video=" in done.stdout
    assert "set LC_ALL=C.UTF-8" in done.stdout


def test_written_where_a_link_leads_nowhere(folder):
    """Replaced as any older file: what was to be lost, is nowhere."""
    path, out = write(folder, row("whole", "good.mp4"), "{oops"), folder / "link.jsonl"
    out.symlink_to(folder / "nowhere.jsonl")
    assert main([str(path), "--write", str(out)]) == 1
    assert len(load_tasks(out).tasks) == 1


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


def answers(*given):
    return {"answers": [dict(zip(("time", "text", "kind", "query"), answer, strict=False)) for answer in given]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            answers((2, "car", "choice")),
            "answers[0].kind=choice, but its text 'car' does not begin with an option's letter",
        ),
        (answers((2, "maybe", "yes_no")), "answers[0].kind=yes_no, but its text 'maybe' says neither yes nor no"),
        (answers((2, "yes and no", "yes_no")), "says neither yes nor no, or both"),
        (answers((2, "lots", "integer")), "answers[0].kind=integer, but its text 'lots' is not one whole number"),
        (answers((2, "2.5", "integer")), "is not one whole number"),
        (answers((2, "3", "integer"), (4, "some", "integer")), "answers[1].kind=integer"),
        (answers((2, "red"), (4, "blue")), "answers[0] and answers[1] both answer queries[0], which closes"),
        (answers((2, "red"), (2, "red")), "set queries[0].stay_open=true"),
        (
            answers((2, "red"), (5, "blue")) | {"queries": [{"time": 1, "text": "q", "stay_open": True, "until": 4}]},
            "answers[1] is due at 5 s, after queries[0] closes (until=4)",
        ),
    ],
)
def test_a_row_that_contradicts_itself_is_named_by_its_line_and_left_out(folder, capsys, fields, reason):
    path = write(folder, row("whole", "good.mp4"), row("odd", "good.mp4") | fields)
    assert main([str(path)]) == 1
    said = capsys.readouterr().out
    assert f"skipped {path}:2: task odd: " in said
    assert reason in said
    assert [task.id for task in load_tasks(path).tasks] == ["whole"]


@pytest.mark.parametrize("text", ["B", "(c)", "B. car", "a red car", "Option B"])
def test_choices_that_name_a_letter_are_right_with_it(folder, text):
    path = write(folder, row("odd", "good.mp4") | answers((2, text, "choice")))
    assert main([str(path)]) == 0
    letter = {"B": "B", "(c)": "C", "B. car": "B", "a red car": "A.", "Option B": "B"}[text]
    assert is_correct(letter, text, "choice")
    assert not is_correct("D", text, "choice")


def test_two_answers_in_one_chunk_are_warned_about(folder, capsys):
    asked = {"queries": [{"time": 1, "text": "count", "stay_open": True}]}
    path = write(folder, row("two", "good.mp4") | asked | answers((2.0, "1", "integer"), (3.2, "2", "integer")))
    assert main([str(path)]) == 0
    assert main([str(path), "--chunk-seconds", "2"]) == 1
    said = capsys.readouterr().out
    assert f"warning: {path}:1: task two (" in said
    assert "answers[1] is due in turn 1 (2 s long), like answers[0]: a turn holds one response" in said
    assert "1 rows usable, 0 skipped, 1 videos opened, 1 warnings" in said


def test_every_row_that_is_left_out_is_named_by_its_line(folder, capsys):
    path = write(
        folder,
        row("whole", "good.mp4"),
        row("broken", "broken.mp4"),
        row("gone", "gone.mp4"),
        row("forged", "good.mp4") | {"queries": [{"time": 1, "text": "<silent>"}]},
        row("far", "good.mp4", answer=9.0),
    )
    assert main([str(path), "--max-turns", "8"]) == 1
    said = capsys.readouterr().out
    for line, name in ((2, "broken"), (3, "gone"), (4, "forged")):
        assert f"skipped {path}:{line}: task {name} (" in said
    assert f"warning: {path}:5: task far (" in said
    assert "in turn 9, after the stream's last turn 7 (raise data.max_turns=8)" in said


def test_training_rows_in_the_held_out_file_are_counted(folder, capsys):
    train = write(folder, row("a", "good.mp4"), row("b", "good.mp4") | {"queries": [{"time": 1, "text": "other"}]})
    held = folder / "heldout.jsonl"
    held.write_text("\n".join(json.dumps(r) for r in (row("x", "./good.mp4"), row("y", "good.mp4"))))
    for words in (["--against", str(train)], [f"against={train}"]):
        assert main([str(held), *words]) == 1
        said = capsys.readouterr().out
        assert f"warning: 2 of 2 rows of {held} ask what a row of {train} asks" in said
        assert f"for example {held}:1 and {train}:1" in said
    held.write_text(json.dumps(row("x", "good.mp4") | {"queries": [{"time": 1, "text": "new"}]}))
    assert main([str(held), "--against", str(train)]) == 0
    assert main([str(held), "--against", str(folder / "nowhere.jsonl")]) == 2


# ---- with and without the model's tokenizer ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"), TinySpec(hidden=64, layers=2, mlp=128))


@pytest.mark.parametrize("spell", [lambda model: ["--model", str(model)], lambda model: [f"model={model}"]])
def test_with_a_model_its_tokenizer_says_what_is_a_control_token(folder, capsys, model, spell):
    texts = ("<|foo|>", "<|box_start|>", "<|endoftext|>", "plain")
    rows = [row(text, "good.mp4") | {"queries": [{"time": 1, "text": f"say {text}"}]} for text in texts]
    path = write(folder, *rows)
    assert main([str(path), *spell(model)]) == 1
    said = capsys.readouterr().out
    assert "2 rows usable, 2 skipped" in said
    assert f"{path}:2: task <|box_start|> (" in said
    assert "spells the control token '<|endoftext|>'" in said
    assert "not checked" not in said


def test_without_a_model_only_what_every_run_refuses_is_refused_and_the_rest_is_said(folder, capsys):
    texts = ("<|foo|>", "<|box_start|>", "<think>")
    path = write(folder, *[row(text, "good.mp4") | {"queries": [{"time": 1, "text": text}]} for text in texts])
    assert main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "2 rows usable, 1 skipped" in said
    assert "not checked, name the model with --model DIR" in said
    assert f"2 rows hold what looks like one, for example {path}:1: '<|foo|>'" in said


def test_with_a_model_what_is_longer_than_a_turn_is_named(folder, capsys, model):
    long = "a red square, a green circle, a blue triangle"
    path = write(
        folder,
        row("whole", "good.mp4"),
        row("answer", "good.mp4") | answers((2, long)),
        row("thought", "good.mp4") | {"thoughts": [{"time": 1.5, "text": long}]},
    )
    budgets = ["--max-new-tokens", "10", "--think-budget", "6"]
    assert main([str(path), "--model", str(model), *budgets]) == 1
    said = capsys.readouterr().out
    assert f"skipped {path}:2: task answer (" in said
    assert "longer than a turn: layout.max_new_tokens=10 leaves room for 'a red" in said
    assert f"warning: {path}:3: task thought (" in said
    assert "a cold start leaves the row out: the thought of turn 1 has" in said
    assert main([str(path), *budgets]) == 0, "without a tokenizer nothing has a length"


def test_a_model_that_is_none_is_an_error(folder, capsys):
    path = write(folder, row("whole", "good.mp4"))
    for given in (folder, folder / "nowhere"):
        assert main([str(path), "--model", str(given)]) == 2
        assert str(given) in capsys.readouterr().err


# ---- what is written ----


def same_file(folder, path, how):
    if how == "itself":
        return path
    if how == "relative":
        return Path(os.path.relpath(path))
    if how == "dots":
        return folder / ".." / folder.name / path.name
    link = folder / "link.jsonl"
    if how == "symlink":
        link.symlink_to(path)
    else:
        link.hardlink_to(path)
    return link


@pytest.mark.parametrize("how", ["itself", "relative", "dots", "symlink", "hard link"])
def test_the_checked_file_is_never_written_over(folder, capsys, how):
    path = write(folder, row("whole", "good.mp4"), "{oops", row("gone", "gone.mp4"))
    before = path.read_bytes()
    out = same_file(folder, path, how)
    assert main([str(path), "--write", str(out)]) == 2
    assert "is the file that is checked" in capsys.readouterr().err
    assert path.read_bytes() == before == out.read_bytes()


def test_nothing_else_that_matters_is_written_over(folder, capsys):
    path = write(folder, row("whole", "good.mp4"))
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    (folder / "videos").mkdir()
    film = (folder / "good.mp4").read_bytes()
    for out, why in (
        (folder / "videos", "is a folder"),
        (fifo, "is no regular file"),
        (folder / "good.mp4", "is a video of the checked rows"),
        (folder / "nowhere" / "out.jsonl", "there is no folder"),
    ):
        assert main([str(path), "--write", str(out)]) == 2
        assert why in capsys.readouterr().err
    assert (folder / "videos").is_dir()
    assert fifo.is_fifo()
    assert (folder / "good.mp4").read_bytes() == film


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_or_folder_without_permission_is_left_alone(folder, capsys):
    path = write(folder, row("whole", "good.mp4"))
    out = folder / "kept.jsonl"
    out.write_text("kept")
    out.chmod(0o444)
    assert main([str(path), "--write", str(out)]) == 2
    assert "is read-only" in capsys.readouterr().err
    assert out.read_text() == "kept"


def test_an_earlier_result_is_replaced(folder):
    path = write(folder, row("whole", "good.mp4"), "{oops")
    out = folder / "out.jsonl"
    for _ in range(2):
        assert main([str(path), "--write", str(out)]) == 1
        assert [task.id for task in load_tasks(out, on_bad="raise").tasks] == ["whole"]


# ---- what is printed ----


def command(path, *words, env=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "streams.data.check", str(path), *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
        env=os.environ | (env or {}),
        **options,
    )


ODD = {"category": "颜色 – naïve", "answers": [{"time": 50, "text": "é"}]}


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "1", "TERM": "dumb"},
    ],
)
def test_any_terminal_can_show_what_is_found(folder, env):
    path = write(folder, row("ganz", "good.mp4") | {"category": "颜色"}, row("späte Zeile\n\x1b[2J", "good.mp4") | ODD)
    done = command(path, env=env, stdout=subprocess.PIPE)
    assert done.returncode == 1, done.stderr
    assert done.stderr == b""
    assert b"1 rows usable, 1 skipped" in done.stdout
    assert rb"Zeile\n\x1b[2J (" in done.stdout
    shown = "颜色".encode(env.get("PYTHONIOENCODING", "utf-8").partition(":")[0], errors="backslashreplace")
    assert shown in done.stdout or rb"\u989c\u8272" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    path = write(folder, row("whole", "good.mp4"), "{oops")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = command(path, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_said(folder):
    path = write(folder, row("whole", "good.mp4"))
    with open("/dev/full", "wb") as full:
        done = command(path, stdout=full)
    assert done.returncode == 2
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


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
    command = [sys.executable, "-m", "streams.data.check", str(path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "unknown field x" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = subprocess.run(
        [*command, "--ignore-field", "x"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert "answers: choice 1; to 1 questions" in done.stdout

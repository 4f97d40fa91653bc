import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.data import dataset
from streams.data.dataset import PARSERS, SkippedSample, load_tasks, write_tasks
from streams.task import ANSWER_KINDS, ExpectedAnswer, StreamTask, TimedQuery, TimedThought
from tests.support.project import ROOT

pytestmark = pytest.mark.smoke

ROW = {
    "id": "a",
    "video": "clips/a.mp4",
    "start": 1,
    "end": 10.5,
    "queries": [{"time": 2, "text": "what?"}, {"time": 3.5, "text": "alarm", "stay_open": True, "until": 9}],
    "answers": [{"time": 4, "text": "red"}, {"time": 5, "text": "3", "kind": "integer", "query": 1}],
    "thoughts": [{"time": 1, "text": ""}],
    "category": "now",
}


def changed(**fields):
    return {key: value for key, value in {**ROW, **fields}.items() if value != "DROP"}


def write(tmp_path, *lines):
    path = tmp_path / "tasks.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_row_becomes_a_task(tmp_path):
    found = load_tasks(write(tmp_path, ROW))
    assert found.skipped == ()
    assert found.tasks == (
        StreamTask(
            id="a",
            video=str(tmp_path / "clips/a.mp4"),
            start=1.0,
            end=10.5,
            queries=(TimedQuery(2.0, "what?"), TimedQuery(3.5, "alarm", True, 9.0)),
            answers=(ExpectedAnswer(4.0, "red"), ExpectedAnswer(5.0, "3", "integer", 1)),
            thoughts=(TimedThought(1.0, ""),),
            category="now",
        ),
    )
    assert isinstance(found.tasks[0].start, float)


def test_a_file_is_known_by_what_was_read_of_it(tmp_path, monkeypatch):
    path = write(tmp_path, ROW, changed(id="b"))
    found = load_tasks(path)
    assert found.digest == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    lines = dataset._lines

    def while_somebody_writes(path):
        for line in lines(path):
            path.write_text(json.dumps(ROW))
            yield line

    monkeypatch.setattr(dataset, "_lines", while_somebody_writes)
    with pytest.raises(ValueError, match=f"{path} was changed while it was read"):
        load_tasks(path)


def test_a_name_that_datasets_takes_for_two_is_refused(tmp_path):
    path = write(tmp_path, ROW).rename(tmp_path / "a::b.jsonl")
    with pytest.raises(ValueError, match=r"a::b\.jsonl: .*rename it"):
        load_tasks(path)


def test_reading_rows_loads_no_torch(tmp_path):
    """The driver reads them, and holds neither torch's memory nor waits for its import."""
    code = (
        "import sys; from streams.data.dataset import load_tasks; "
        f"print(len(load_tasks({str(write(tmp_path, ROW))!r}).tasks), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_minimal_row_and_absolute_video(tmp_path):
    row = {"id": "b", "video": "/v/b.mp4", "end": 3, "queries": [{"time": 0, "text": "q"}]}
    task = load_tasks(write(tmp_path, row | {"answers": [{"time": 0, "text": "x"}]}), root="/").tasks[0]
    assert (task.start, task.video, task.category, task.thoughts) == (0.0, "/v/b.mp4", "", ())


ONE_QUERY = [{"time": 2, "text": "q"}]
BAD = [
    ("{not json", "not JSON"),
    ("[1, 2]", "the row must be an object, not [1, 2]"),
    ("null", "the row must be an object, not null"),
    ("[" * 100_000, "not"),
    ('{"id": "a", "id": "b"}', "field id appears twice"),
    (json.dumps(ROW).replace("10.5", "NaN"), "NaN is not a number"),
    (json.dumps(ROW).replace("10.5", "-Infinity"), "-Infinity is not a number"),
    (json.dumps(ROW).replace("10.5", "1e999"), "end must be a finite number"),
    (json.dumps(ROW).replace("10.5", "1" + "0" * 400), "end must be a finite number"),
    (changed(id="DROP"), "id is missing"),
    (changed(id=""), "id is empty"),
    (changed(id=3), "id must be a string, not 3"),
    (changed(video=None), "video must be a string, not null"),
    (changed(end="10"), 'end must be a number, not "10"'),
    (changed(end=True), "end must be a number, not true"),
    (changed(start=None), "start must be a number, not null"),
    (changed(start=20), "start=20.0 and end=10.5 must satisfy"),
    (changed(queries={}), "queries must be a list, not {}"),
    (changed(queries=[]), "at least one query"),
    (changed(queries=["q"]), 'queries[0] must be an object, not "q"'),
    (changed(queries=[{"time": 2}]), "queries[0].text is missing"),
    (
        changed(queries=[{"time": 2, "text": "q", "until": 4}]),
        "queries[0]: query until=4.0 has no effect without",
    ),
    (
        changed(queries=[{"time": 2, "text": "q", "stay_open": 1}]),
        "queries[0].stay_open must be true or false",
    ),
    (changed(answers="DROP"), "answers is missing"),
    (changed(answers=[{"time": 99, "text": "x"}]), "answers[0].time=99.0 must lie between"),
    (changed(answers=[{"time": 4, "text": " "}]), "answers[0].text is empty"),
    (
        changed(answers=[{"time": 4, "text": "x", "kind": "odd"}]),
        "answers[0]: answer kind 'odd' is not one of",
    ),
    (changed(answers=[{"time": 4, "text": "x", "query": 0.0}]), "answers[0].query must be a whole number"),
    (changed(answers=[{"time": 4, "text": "x", "query": True}]), "answers[0].query must be a whole number"),
    (changed(answers=[{"time": 4, "text": "x", "query": 7}]), "answers[0].query=7 names no query"),
    (changed(answers=[{"time": 4, "txt": "x"}]), "unknown field answers[0].txt"),
    (changed(colour=1), "unknown field colour (known: answers, category"),
    (changed(thoughts=[{"time": 50, "text": ""}]), "thoughts[0].time=50.0 lies outside"),
    (changed(category="\ud800"), "category contains half of a surrogate pair"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_row_costs_that_row_only(tmp_path, bad, reason):
    good = changed(id="good", queries=ONE_QUERY, answers=[{"time": 2, "text": "x"}])
    path = write(tmp_path, "", good, bad, "  ", changed(id="last"))
    found = load_tasks(path)
    assert [task.id for task in found.tasks] == ["good", "last"]
    (skipped,) = found.skipped
    assert skipped.source == f"{path}:3"
    assert reason in skipped.reason
    with pytest.raises(ValueError, match=r"tasks\.jsonl:3: ") as caught:
        load_tasks(path, on_bad="raise")
    assert reason in str(caught.value)


def test_duplicate_ids(tmp_path):
    path = write(tmp_path, ROW, ROW)
    assert load_tasks(path).skipped == (SkippedSample(f"{path}:2", "id='a' is already used in line 1"),)


def test_bytes_that_are_not_utf8_cost_their_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\r\n" + b'{"id": "\xff"}\r\n' + json.dumps(changed(id="c")).encode())
    found = load_tasks(path)
    assert [task.id for task in found.tasks] == ["a", "c"]
    assert found.skipped[0].source.endswith(":2")
    assert "UTF-8" in found.skipped[0].reason


def test_a_byte_order_mark_costs_nothing(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert load_tasks(path, on_bad="raise").tasks[0].id == "a"


def test_missing_empty_and_useless_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl does not exist \(set data\.\* or run job=data\)"):
        load_tasks(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_tasks(tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        load_tasks(write(tmp_path))
    with pytest.raises(ValueError, match="holds no usable row"):
        load_tasks(write(tmp_path, "", "  "))
    with pytest.raises(ValueError, match=r"no usable row.*tasks.jsonl:1: not JSON"):
        load_tasks(write(tmp_path, "oops"))


def test_a_rewritten_file_is_read_anew_and_names_are_no_patterns(tmp_path):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    path = write(folder, changed(id="one"))
    stamp = path.stat().st_mtime_ns
    assert load_tasks(path).tasks[0].id == "one"
    write(folder, changed(id="two"))
    os.utime(path, ns=(stamp, stamp))
    assert load_tasks(path).tasks[0].id == "two"


def test_relative_path_and_videos_below_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    task = load_tasks(write(tmp_path / "d", ROW)).tasks[0]
    write_tasks("d/again.jsonl", [task])
    assert json.loads((tmp_path / "d/again.jsonl").read_text())["video"] == "clips/a.mp4"
    assert load_tasks("d/again.jsonl").tasks == (task,)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write(tmp_path, ROW)
    task = load_tasks(path).tasks[0]
    broken = StreamTask(**{**vars(task), "answers": (ExpectedAnswer(4.0, object.__new__(Odd)),)})
    with pytest.raises(TypeError):
        write_tasks(path, [task, broken])
    assert load_tasks(path).tasks == (task,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tasks.jsonl"]


class Odd:
    def strip(self):
        return "x"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), min_size=1).filter(str.strip)


FITTING = {"text": TEXT, "choice": st.sampled_from("ABCDE"), "yes_no": st.sampled_from(["Yes.", "no", "不是"])}
FITTING["integer"] = st.integers().map(str)


@st.composite
def tasks(draw):
    """Tasks that do not contradict themselves: texts fit their kinds, a question that closes has one answer in its time."""
    times = st.floats(1.0, 9.0)
    queries = []
    for time in sorted(draw(st.lists(times, min_size=1, max_size=3))):
        stay = draw(st.booleans())
        until = draw(st.none() | st.floats(9.5, 20.0)) if stay else None
        queries.append(TimedQuery(time, draw(TEXT), stay, until))
    answers = []
    for index in draw(st.lists(st.integers(0, len(queries) - 1), min_size=1, max_size=3)):
        if queries[index].stay_open or index not in [answer.query for answer in answers]:
            kind = draw(st.sampled_from(ANSWER_KINDS))
            answers.append(ExpectedAnswer(draw(st.floats(queries[index].time, 9.5)), draw(FITTING[kind]), kind, index))
    thoughts = tuple(TimedThought(time, draw(st.just("") | TEXT)) for time in draw(st.lists(times, max_size=2)))
    category = draw(st.sampled_from(["", "now"]))
    return StreamTask(draw(TEXT), "/v/x.mp4", 0.5, 10.0, tuple(queries), tuple(answers), thoughts, category)


@settings(max_examples=25, deadline=None)
@given(st.lists(tasks(), min_size=1, max_size=3, unique_by=lambda task: task.id))
def test_what_is_written_is_read_back(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("round") / "tasks.jsonl"
    write_tasks(path, written)
    found = load_tasks(path, on_bad="raise", root="/")
    assert found.tasks == tuple(written)


def test_a_format_entered_in_the_table_reads_its_own_file(tmp_path, monkeypatch):
    def parse(value, folder, number):
        queries, answers = (TimedQuery(0.0, "What?"),), (ExpectedAnswer(1.0, "red", "text"),)
        return StreamTask(f"{value['name']}{number}", str(folder / "a.mp4"), 0.0, 9.0, queries, answers)

    monkeypatch.setitem(PARSERS, "mine", parse)
    monkeypatch.setattr("streams.data.dataset.FORMATS", ("auto", *PARSERS))
    path = tmp_path / "t.jsonl"
    path.write_text('{"name": "x"}\n')
    (task,) = load_tasks(path, format="mine").tasks
    assert (task.id, task.video) == ("x1", str(tmp_path / "a.mp4"))


def test_a_text_that_no_stream_could_hold_costs_its_row_by_name(tmp_path):
    """One of 50 MB, in any field of either format, and questions that are too long together."""
    huge, long = "x" * 50_000_000, "y " * 20_000
    asked = [{"time": 2, "text": huge}, {"time": 2.5, "text": "?"}]
    rows = [
        changed(id="query", queries=asked),
        changed(id="answer", answers=[{"time": 4, "text": "r" * 70_000}]),
        changed(id="thought", thoughts=[{"time": 4, "text": "t" * 70_000}]),
        changed(id="together", queries=[{"time": time, "text": long} for time in (2, 2.5)], answers=ROW["answers"][:1]),
        changed(id="fits", queries=[{"time": 2, "text": long}], answers=ROW["answers"][:1]),
    ]
    found = load_tasks(write(tmp_path, *rows))
    assert [task.id for task in found.tasks] == ["fits"]
    assert [sample.source[-1] for sample in found.skipped] == ["1", "2", "3", "4"]
    for sample, part in zip(
        found.skipped,
        (
            "more than 16,777,216: it holds more than one stream",
            "answers[0].text has 70,000 bytes, a text of a row may have 65,536",
            "thoughts[0].text has 70,000 bytes",
            "its 2 questions have 80,000 bytes, more than 65,536",
        ),
        strict=True,
    ):
        assert part in sample.reason
        assert len(sample.reason) < 200

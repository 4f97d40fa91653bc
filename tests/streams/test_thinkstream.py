"""ThinkStream's records as tasks: what belongs to what, which kind an answer has, and what a bad record costs."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.data.dataset import load_tasks, write_tasks
from streams.data.durations import END_SLACK_S, bounded
from streams.data.formats.thinkstream import answer_kind, parse_record
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery, TimedThought
from streams.video.config import VideoConfig
from streams.video.reader import ClipReader, VideoError
from tests.support.clips import write_grey_ramp


def user(text, time=None):
    return {"role": "user", "content": text} | ({} if time is None else {"timestamp": time})


def assistant(text, time):
    return {"role": "assistant", "content": text, "timestamp": time}


SFT = {
    "video_path": "clips/a.mp4",
    "conversations": [user("What is it?", 3.0), assistant("A ball.", 4.5)],
    "thoughts": [{"think": "a ball", "timestamp": 0.5}, {"think": "", "timestamp": 2}],
    "num_tokens": 4096,
}
RLVR = {
    "video_path": "/v/b.mp4",
    "conversations": [user("Which one?\nA. red\nB. blue", 3), assistant("B", 12.5)],
}


def changed(**fields):
    return {key: value for key, value in {**SFT, **fields}.items() if value != "DROP"}


def write(folder, *rows):
    path = folder / "records.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def load_one(folder, row, **more):
    return load_tasks(write(folder, row), on_bad="raise", root="/", **more).tasks[0]


# ---- records ----


def test_a_cold_start_record_becomes_a_task(tmp_path):
    assert load_one(tmp_path, SFT) == StreamTask(
        id="1-a",
        video=str(tmp_path / "clips/a.mp4"),
        start=0.0,
        end=math.inf,
        queries=(TimedQuery(3.0, "What is it?"),),
        answers=(ExpectedAnswer(4.5, "A ball.", "text", 0),),
        thoughts=(TimedThought(0.5, "a ball"), TimedThought(2.0, "")),
        category="text",
    )


def test_an_rlvr_record_becomes_a_task(tmp_path):
    task = load_one(tmp_path, RLVR, format="thinkstream")
    assert (task.video, task.category, task.thoughts) == ("/v/b.mp4", "choice", ())
    assert task.answers == (ExpectedAnswer(12.5, "B", "choice", 0),)


def test_what_the_published_loader_takes_too(tmp_path):
    """A question without a time is asked at once; a time may be spelled as a string."""
    task = load_one(tmp_path, {"video_path": "a.mp4", "conversations": [user("q"), assistant("Yes", "7.25")]})
    assert task.queries[0].time == 0.0
    assert (task.answers[0].time, task.answers[0].kind) == (7.25, "yes_no")


def test_an_answer_belongs_to_the_latest_question_at_or_before_it(tmp_path):
    messages = [
        assistant("three", 9.0),
        user("Count.", 5.0),
        assistant("zero", 5.0),
        user("What colour?", 1.0),
        assistant("red", 2.0),
        assistant("blue", 4.999),
        user("And now?", 20.0),
    ]
    task = load_one(tmp_path, {"video_path": "a.mp4", "conversations": messages})
    assert [(q.time, q.text) for q in task.queries] == [(1.0, "What colour?"), (5.0, "Count."), (20.0, "And now?")]
    assert [(a.text, a.query) for a in task.answers] == [("red", 0), ("blue", 0), ("zero", 1), ("three", 1)]
    # Several answers: the first must not close the question.
    assert [q.stay_open for q in task.queries] == [True, True, False]


TIMES = st.integers(0, 40).map(lambda n: n / 4)


@given(st.lists(TIMES, min_size=1, max_size=5), st.lists(TIMES, min_size=1, max_size=6))
def test_the_rule_of_owners_against_its_own_words(asked, answered):
    first = min(asked)
    answered = [time for time in answered if time >= first] or [first]
    rows = [user(f"q{i}", time) for i, time in enumerate(asked)] + [assistant("x", time) for time in answered]
    from pathlib import Path

    task = parse_record({"video_path": "a.mp4", "conversations": rows}, Path("/v"), 3)
    assert sorted(answered) == [answer.time for answer in task.answers]
    for answer in task.answers:
        owner = task.queries[answer.query].time
        assert owner <= answer.time
        assert not [time for time in asked if owner < time <= answer.time]
    for i, query in enumerate(task.queries):
        assert query.stay_open == (sum(answer.query == i for answer in task.answers) > 1)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("A", "choice"),
        (" (B) ", "choice"),
        ("E.", "choice"),
        ("C)", "choice"),
        ("D:", "choice"),
        ("C. red", "choice"),
        ("(C) red\nand blue", "choice"),
        ("F", "text"),
        ("b", "text"),
        ("A red car", "text"),
        ("C.red", "text"),
        ("yes", "yes_no"),
        ("No.", "yes_no"),
        ("YES!", "yes_no"),
        ("No, it is red", "text"),
        ("7", "integer"),
        ("-12.", "integer"),
        ("3.5", "text"),
        ("three", "text"),
        ("It boils.", "text"),
    ],
)
def test_the_kind_of_an_answer(text, kind):
    assert answer_kind(text) == kind


BAD = [
    (changed(video_path="DROP"), "video_path is missing"),
    (changed(video_path=" "), "video_path is empty"),
    (changed(conversations="DROP"), "conversations is missing"),
    (changed(conversations=[]), "conversations holds no user message"),
    (changed(conversations=[user("q", 1)]), "conversations holds no assistant message"),
    (changed(conversations=[assistant("a", 1)]), "conversations holds no user message"),
    (changed(conversations=["q"]), 'conversations[0] must be an object, not "q"'),
    (
        changed(conversations=[user("q", 3), assistant("early", 2), assistant("late", 4)]),
        "conversations[1]: an answer at 2 s, before the first question (at 3 s)",
    ),
    (
        changed(conversations=[user("q", 3), {"role": "assistant", "content": "x"}]),
        "conversations[1].timestamp is miss",
    ),
    (changed(conversations=[user("q", -3), assistant("x", 4)]), "conversations[0].timestamp=-3 must not be negative"),
    (changed(conversations=[user("q", "soon"), assistant("x", 4)]), "conversations[0].timestamp must be a number of"),
    (changed(conversations=[user("q", "inf"), assistant("x", 4)]), "conversations[0].timestamp must be a number of"),
    (changed(conversations=[user("q", True), assistant("x", 4)]), "conversations[0].timestamp must be a number, not"),
    (changed(conversations=[user("q", 3), assistant(" ", 4)]), "conversations[1].content is empty"),
    (changed(conversations=[user("q", 3), assistant(["x"], 4)]), "conversations[1].content must be a string"),
    (changed(conversations=[{"role": "system", "content": "x"}]), "conversations[0].role must be user or assistant"),
    (changed(conversations=[user("q", 3) | {"score": 1}]), "unknown field conversations[0].score"),
    (changed(thoughts=[{"think": "x"}]), "thoughts[0].timestamp is missing"),
    (changed(thoughts=[{"timestamp": 1}]), "thoughts[0].think is missing"),
    (changed(thoughts=[{"think": "x", "timestamp": -1}]), "thoughts[0].timestamp=-1 must not be negative"),
    (changed(num_tokens="many"), "num_tokens must be a whole number"),
    (changed(num_tokens=-1), "num_tokens must not be negative"),
    (changed(id="a"), "unknown field id (known: conversations, duration, num_tokens, thoughts, video_path; if it"),
    (changed(duration=0), "the video lasts 0 s"),
    (changed(duration=3.2), "answers[0] at 4.5 s lies after the end of the video (3.2 s)"),
    ({"id": "ours", "video": "a.mp4"}, "unknown field id"),
    ("[1]", "the row must be an object, not [1]"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_record_costs_that_record_only(tmp_path, bad, reason):
    path = write(tmp_path, SFT, bad, RLVR)
    found = load_tasks(path, root="/")
    assert [task.id for task in found.tasks] == ["1-a", "3-b"]
    (skipped,) = found.skipped
    assert skipped.source == f"{path}:2"
    assert reason in skipped.reason


def test_the_format_goes_by_the_first_object_and_can_be_forced(tmp_path):
    ours = {"id": "o", "video": "o.mp4", "end": 9, "queries": [{"time": 1, "text": "q"}]}
    ours["answers"] = [{"time": 2, "text": "x"}]
    path = write(tmp_path, "oops", ours, SFT)
    found = load_tasks(path)
    assert [task.id for task in found.tasks] == ["o"]
    assert [sample.source[-1] for sample in found.skipped] == ["1", "3"]
    assert [task.id for task in load_tasks(path, format="thinkstream").tasks] == ["3-a"]
    with pytest.raises(ValueError, match=r"data\.format='csv' is not one of auto, sightline, thinkstream"):
        load_tasks(path, format="csv")


def test_fields_can_be_ignored_by_name_wherever_they_stand(tmp_path):
    row = changed(source="llava", conversations=[user("q", 3) | {"source": 1}, assistant("x", 4)])
    with pytest.raises(ValueError, match=r"unknown field source .*data\.ignore_fields"):
        load_one(tmp_path, row)
    assert load_one(tmp_path, row, ignore_fields=("source",)).queries[0].text == "q"


def test_a_record_written_as_our_own_row_is_the_same_task(tmp_path):
    task = load_one(tmp_path, SFT)
    write_tasks(tmp_path / "ours.jsonl", [task])
    assert "end" not in json.loads((tmp_path / "ours.jsonl").read_text())
    assert load_tasks(tmp_path / "ours.jsonl", on_bad="raise").tasks == (task,)


# ---- lengths ----


def timed(query=3.0, answer=12.5, end=math.inf, start=0.0):
    return StreamTask("a", "a.mp4", start, end, (TimedQuery(query, "q"),), (ExpectedAnswer(answer, "x"),))


def test_items_just_after_the_end_belong_to_the_last_chunk():
    task = bounded(timed(answer=30.0), 30.0)
    assert task.end == 30.0
    for chunk in (0.5, 1.0, 3.0, 7.0):
        assert task.due_turns(chunk) == math.ceil(30 / chunk)
    assert bounded(timed(answer=30.0 + END_SLACK_S), 30.0).answers[0].time < 30.0
    with pytest.raises(ValueError, match=r"answers\[0\] at 31\.5 s lies after the end of the video \(30 s\)"):
        bounded(timed(answer=31.5), 30.0)
    with pytest.raises(ValueError, match=r"queries\[0\] at 32 s"):
        bounded(timed(query=32, answer=40), 30.0)
    assert bounded(timed(), 60.0) == timed(end=60.0)


@pytest.mark.parametrize(
    ("seconds", "chunk"),
    [(0.4, 1), (120, 1), (120.1, 2), (240, 2), (241, 3), (3600, 30), (60, 1)],
)
def test_the_published_chunk_length_is_a_hundred_and_twentieth_of_the_video(seconds, chunk):
    task = timed(0.1, 0.2, end=seconds)
    assert VideoConfig(max_chunks=120).chunk_seconds_of(task) == chunk
    assert VideoConfig().chunk_seconds_of(task) == 1.0


@given(st.floats(1, 1e5), st.integers(1, 500), st.floats(0.1, 5))
def test_a_task_never_has_more_chunks_than_the_limit(seconds, limit, shortest):
    task = timed(0.0, 0.5, end=seconds)
    config = VideoConfig(chunk_seconds=shortest, max_chunks=limit)
    assert task.num_turns(config.chunk_seconds_of(task), 10**6, 10**6) <= limit
    assert config.chunk_seconds_of(task) >= shortest


def test_a_chunk_length_by_duration_needs_the_duration():
    with pytest.raises(ValueError, match=r"a\.mp4: data\.video\.max_chunks=120"):
        VideoConfig(max_chunks=120).chunk_seconds_of(timed())
    with pytest.raises(ValueError, match=r"data\.video\.max_chunks=-1"):
        VideoConfig(max_chunks=-1)


def test_without_an_end_a_stream_is_as_long_as_its_answers_and_the_tail():
    assert timed(answer=12.5).num_turns(1.0, 3, 100) == 16
    assert timed(answer=12.5).num_turns(2.0, 3, 100) == 10
    assert timed(answer=12.5).num_turns(1.0, 3, 10) == 10
    assert timed(answer=12.5, end=14.0).num_turns(1.0, 3, 100) == 14


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """100 frames at 8 a second: 12.5 s."""
    return write_grey_ramp(tmp_path_factory.mktemp("ramp") / "ramp.mp4", 100, 8)


@pytest.fixture(scope="module")
def reader():
    with ClipReader(VideoConfig()) as found:
        yield found


def video_task(path, answer, end=math.inf):
    return StreamTask("r", str(path), 0.0, end, (TimedQuery(0.0, "q"),), (ExpectedAnswer(answer, "x"),))


def test_the_length_of_a_video_and_its_frames_come_from_one_process(ramp, reader):
    assert reader.duration(str(ramp)) == pytest.approx(12.5, abs=0.01)
    assert reader.read(str(ramp), 0.0, 12.5, 13).frames.shape[0] == 13
    assert reader.duration(str(ramp)) == pytest.approx(12.5, abs=0.01)


def test_the_tail_of_a_stream_ends_with_its_video(ramp, reader):
    task = video_task(ramp, 11.2)
    clip = reader.read_task(task, Plan(task.num_turns(1.0, 5, 100), 1.0))
    # Chunk 12 holds the last half second; of the 17 chunks asked for, four do not exist.
    assert len(clip.frames) == 13
    assert clip.frame_times.shape == (13, 2)
    assert len(reader.read_task(task, Plan(4, 1.0)).frames) == 4
    whole = reader.read(str(ramp), 0.0, 12.5, 13)
    assert (clip.frames == whole.frames).all()


@pytest.mark.parametrize(("answer", "fits"), [(12.4, True), (12.6, True), (13.0, False), (60.0, False)])
def test_the_last_answer_must_lie_in_the_video(ramp, reader, answer, fits):
    task = video_task(ramp, answer)
    turns = task.num_turns(1.0, 3, 1000)
    if fits:
        assert len(reader.read_task(task, Plan(turns, 1.0)).frames) == 13
        return
    with pytest.raises(VideoError, match=rf"chunk {int(answer)} starts at {answer:g} s but the file holds 12\.50 s"):
        reader.read_task(task, Plan(turns, 1.0))


def test_chunk_lengths_by_duration_reach_the_frames(ramp):
    with ClipReader(VideoConfig(max_chunks=5)) as reader:
        task = video_task(ramp, 1.0, end=12.5)
        clip = reader.read_task(task, Plan(5, reader.config.chunk_seconds_of(task)))
        assert clip.frame_times[:, 0].tolist() == [0.75, 3.75, 6.75, 9.75, 12.75]


def test_lengths_are_asked_only_where_they_matter_and_a_bad_video_costs_its_rows(tmp_path, ramp):
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 64)
    rows = [
        {"video_path": str(ramp), "conversations": [user("q"), assistant("x", 12.9)]},
        {"video_path": "gone.mp4", "conversations": [user("q"), assistant("x", 1)]},
        {"video_path": "broken.mp4", "conversations": [user("q"), assistant("x", 1)]},
        {"video_path": str(ramp), "conversations": [user("q"), assistant("x", 99)]},
        {"video_path": "gone.mp4", "duration": 300, "conversations": [user("q"), assistant("x", 1)]},
    ]
    path = write(tmp_path, *rows)
    assert len(load_tasks(path, root="/").tasks) == len(load_tasks(path, video=VideoConfig(), root="/").tasks) == 5
    config = VideoConfig(max_chunks=120)
    found = load_tasks(path, video=config, root="/")
    assert [round(task.end, 2) for task in found.tasks] == [12.5, 300.0]
    assert [config.chunk_seconds_of(task) for task in found.tasks] == [1.0, 3.0]
    assert [sample.source for sample in found.skipped] == [f"{path}:{n}" for n in (2, 3, 4)]
    for sample, part in zip(
        found.skipped, ("gone.mp4: the file", "broken.mp4: its length", "after the end"), strict=True
    ):
        assert part in sample.reason
    with pytest.raises(ValueError, match=r"records\.jsonl:2: .*gone\.mp4"):
        load_tasks(path, video=config, on_bad="raise", root="/")

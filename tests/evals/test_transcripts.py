"""Transcripts: which streams, what a line says, and a page that keeps to its budget and lets nothing out of its data."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evals.heldout import ScoredStream
from evals.transcripts.choose import choose
from evals.transcripts.frames import THUMB_PIXELS, read_strips
from evals.transcripts.page import main, write_page
from evals.transcripts.record import OUTCOMES, outcome
from rewards.compose import AnswerResult, RewardResult
from streams.log.record import Kind
from streams.support.files import write_atomic
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery
from tests.support.clips import solid, write_clip
from tests.support.project import ROOT
from tests.support.transcripts import HOSTILE, LONG, VIDEO, WINDOW, data_of, make

DOCS = ROOT / "docs" / "transcripts.md"


# ---- choice ----


def scored(name: str, category: str, reward: float, failed: str | None = None) -> ScoredStream:
    task = StreamTask(
        name, "a.mp4", 0.0, 4.0, (TimedQuery(1.0, "?"),), (ExpectedAnswer(2.0, "red"),), category=category
    )
    return ScoredStream(task, Plan(4, 1.0), (), RewardResult(reward, {}, ()), None, failed)


@st.composite
def results(draw) -> list[ScoredStream]:
    rewards = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    count = draw(st.integers(1, 20))
    failures = st.sampled_from([None, None, None, "broken"])
    return [scored(f"t{i:02}", draw(st.sampled_from("abc")), draw(rewards), draw(failures)) for i in range(count)]


@given(results(), st.integers(1, 25), st.randoms())
def test_the_choice_is_deterministic_and_takes_each_task_once(streams, count, random):
    before = {s.task.id: random.choice([0.0, 0.5, 1.0]) for s in streams}
    chosen = choose(streams, before, count)
    shuffled = list(streams)
    random.shuffle(shuffled)
    assert choose(shuffled, before, count) == chosen
    assert len(chosen) == len(set(chosen)) == min(count, len(streams))
    assert chosen == choose(streams, before, 25)[:count]


@given(results())
def test_every_category_shows_its_worst_first_and_its_best_second(streams):
    chosen = choose(streams, {}, 25)
    for category in {s.task.category for s in streams}:
        ran = [s for s in streams if s.task.category == category and s.failed is None]
        rewards = {s.task.id: s.result.total for s in ran}
        picked = [rewards[task] for task in chosen if task in rewards]
        assert picked[:1] == sorted(rewards.values())[:1]
        assert picked[1:2] == sorted(rewards.values())[1:][-1:]
        own = [s.task.id for s in streams if s.task.category == category]
        order = [task in rewards for task in chosen if task in own]
        assert order == sorted(order, reverse=True), "failed streams come last"
    first = chosen[: len({s.task.category for s in streams})]
    assert sorted(s.task.category for s in streams if s.task.id in first) == sorted({s.task.category for s in streams})


def test_what_changed_most_is_shown_after_the_worst():
    streams = [scored("a", "c", 0.0), scored("b", "c", 0.9), scored("d", "c", 1.0), scored("e", "c", 1.0)]
    assert choose(streams, {"a": 0.0, "b": 0.9, "d": 0.2, "e": 1.0}, 3) == ("a", "d", "e")


# ---- outcomes ----


@pytest.mark.parametrize(
    ("turn", "correct", "timing", "wanted"),
    [
        (None, False, 0.0, "silent"),
        (7, False, 0.5, "wrong"),
        (5, True, 1.0, "right"),
        (6, True, 1.0, "right"),
        (7, True, 0.5, "late"),
        (3, True, 0.0, "early"),
    ],
)
def test_an_answer_has_one_outcome(turn, correct, timing, wanted):
    assert outcome(AnswerResult(0, "now", turn, 5, correct, timing, 0.0)) == wanted
    assert wanted in OUTCOMES


# ---- lines, from real logs ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "streams")


@pytest.fixture(scope="module")
def records(made):
    return {name: results.records(name) for name, results in made.items()}


@pytest.fixture(scope="module")
def lines(records):
    return {line["task"]: line for line in records["rl"]}


@pytest.mark.slow
def test_a_line_tells_what_was_expected_and_what_was_said(lines):
    line = lines["recall-0"]
    (answer,) = line["answers"]
    assert (answer["query_turn"], answer["due_turn"], answer["response_turn"]) == (2, 6, 6)
    assert (answer["text"], answer["response"], answer["outcome"]) == ("red", "blue", "wrong")
    assert answer["components"] == {"correctness": 0.0, "timing": 1.0}
    assert answer["window"] == [[6, 1.0], [7, 0.75], [8, 0.5], [9, 0.25]]
    assert [t["turn"] for t in line["turns"] if t["response"] is not None] == [6, 9]
    assert [t["turn"] for t in line["turns"] if t["queries"]] == [2]
    assert (line["turns"][3]["start"], line["turns"][3]["end"]) == (3.0, 4.0)
    assert line["turns"][3]["thought"] == "nothing new 3"
    assert lines["hostile-0"]["turns"][4]["thought"] == f"{HOSTILE} 4"


@pytest.mark.slow
def test_memory_in_a_line_adds_up_and_follows_the_policy(made, lines):
    logs = {s.task.id: log for s, log in zip(made["rl"].streams, made["rl"].logs, strict=True)}
    for task, line in lines.items():
        log = logs[task]
        if log is None:
            continue
        assert sum(t["tokens"] for t in line["turns"]) == len(log)
        assert sum(t["evicted_tokens"] for t in line["turns"]) == log.evicted_tokens
        system = int((log.kind == Kind.SYSTEM).sum())
        for t in line["turns"]:
            shown = [other["video"] for other in line["turns"][: t["turn"] + 1]]
            assert t["live_tokens"] == t["video_tokens"] + t["text_tokens"] == sum(t["live"].values())
            assert t["video_tokens"] == sum(chunk["tokens"] for chunk in shown[-WINDOW:])
        # The lives of all turns' video and text, at any turn, are that turn's counts.
        for at in {0, 3, len(line["turns"]) - 1}:
            video = sum(live_at(t["video"]["live"], at) for t in line["turns"])
            text = sum(live_at(t["text_live"], at) for t in line["turns"])
            assert video == line["turns"][at]["video_tokens"]
            assert text + system == line["turns"][at]["text_tokens"]


def live_at(changes: list, turn: int) -> int:
    return next((live for since, live in reversed(changes) if since <= turn), 0)


@pytest.mark.slow
def test_a_stream_that_could_not_be_run_has_a_line_with_its_cause_and_null_counts(lines):
    line = lines["failed-0"]
    assert line["failed"] == "VideoError: no such file"
    assert line["category"] == "uncategorised"
    assert line["policy"] is None
    assert {t["live_tokens"] for t in line["turns"]} == {None}
    assert [a["outcome"] for a in line["answers"]] == ["silent"]


@pytest.mark.slow
def test_every_key_of_the_format_is_documented_and_a_line_survives_json(records):
    text = DOCS.read_text()
    keys = set()
    for line in (line for lines in records.values() for line in lines):
        assert json.loads(json.dumps(line, allow_nan=False)) == line
        parts = [line, *line["answers"], *line["queries"], *line["turns"]]
        keys |= {key for part in parts for key in part} | {k for t in line["turns"] if t["video"] for k in t["video"]}
    assert len(keys) > 40
    assert not {key for key in keys if f"`{key}`" not in text}


# ---- the page ----


@pytest.mark.slow
@pytest.mark.parametrize("budget_mb", [0.25, 0.5, 8.0])
def test_the_page_stays_under_its_budget_and_says_what_it_leaves_out(records, tmp_path, budget_mb):
    page = tmp_path / "rl.html"
    notes = write_page(page, records, VIDEO, budget_mb, {})
    assert page.stat().st_size <= budget_mb * 2**20
    data = data_of(page)
    assert data["notes"] == list(notes)
    shown = {s["task"]: s for s in data["streams"]}
    assert "no frames" in shown["gone-0"]["frames_note"]
    short = shown["alert-0"]
    assert [len(short["frames"][str(t)]) for t in range(12)] == [2] * 12, "short streams keep theirs"
    assert list(short["runs"]) == ["rl", "sft", "recent_frames"]
    if budget_mb == 8.0:
        assert len(shown["long-0"]["frames"]) == LONG
        assert len(notes) == 1
    elif "long-0" in shown:
        assert len(shown["long-0"]["frames"]) < LONG
        assert shown["long-0"]["frames_note"]
    else:
        assert "1 of 8 streams do not fit into eval.transcript_mb=0.25" in notes


@pytest.mark.slow
def test_nothing_in_the_data_can_end_its_block_or_be_taken_for_a_placeholder(records, tmp_path):
    page = tmp_path / "x<y.html"
    write_page(page, records, VIDEO, 8.0, {})
    text = page.read_text()
    block = re.search(r'id="data">(.*?)</script>\n<script>', text, re.DOTALL)[1]
    assert "<" not in block
    assert ">" not in block
    assert json.loads(block)["streams"][4]["category"] == HOSTILE
    assert text.count("</script>") == 2
    assert "<title>x&lt;y - transcripts</title>" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


@pytest.mark.slow
def test_the_command_makes_the_page_again_and_tells_results_of_the_same_name_apart(records, tmp_path, capsys):
    for run in ("a", "b"):
        text = "".join(json.dumps(line) + "\n" for line in records["rl"][:2])
        write_atomic(tmp_path / run / "transcripts" / "rl.jsonl", text)
    page = tmp_path / "both.html"
    assert main([str(page), *(str(tmp_path / run / "transcripts" / "rl.jsonl") for run in "ab")]) == 0
    assert [r["name"] for r in data_of(page)["results"]] == ["rl", "rl (b)"]
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert main([]) == 2


@pytest.mark.slow
def test_other_formats_and_other_chunks_are_refused(records, tmp_path):
    line = records["rl"][0]
    with pytest.raises(ValueError, match="transcript format 2 of alert-0 is not 1"):
        write_page(tmp_path / "a.html", {"rl": [line | {"format": 2}]}, VIDEO, 1.0, {})
    with pytest.raises(ValueError, match="sft: alert-0 has other chunks"):
        write_page(tmp_path / "a.html", {"rl": [line], "sft": [line | {"chunk_seconds": 2.0}]}, VIDEO, 1.0, {})
    assert list(tmp_path.iterdir()) == []


# ---- frames ----


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(budget=st.integers(0, 60_000))
def test_frames_never_exceed_their_budget_and_a_strip_names_what_it_lacks(lines, budget):
    streams = {task: lines[task] for task in ("alert-0", "now-0", "gone-0")}
    strips = read_strips(streams, VIDEO, budget)
    assert strips.keys() == streams.keys()
    assert sum(strip.nbytes for strip in strips.values()) <= budget
    for task, strip in strips.items():
        whole = len(strip.frames) == 12 and {len(uris) for uris in strip.frames.values()} == {2}
        assert bool(strip.note) != whole, task


@pytest.mark.slow
def test_a_thumbnail_keeps_the_shape_and_the_colours_of_its_video(tmp_path):
    write_clip(tmp_path / "wide.mp4", solid((200, 40, 40), 8, 180, 400), 4)
    stream = {"video": str(tmp_path / "wide.mp4"), "start": 0.0, "end": 2.0, "turns": [{}, {}]}
    large = replace(VIDEO, max_pixels=10**6, min_pixels=10**5)
    strip = read_strips({"a": stream}, large, 2**20)["a"]
    image = Image.open(BytesIO(b64decode(strip.frames[1][1].split(",")[1])))
    assert image.width / image.height == pytest.approx(400 / 180, abs=0.04)
    assert 0.9 * THUMB_PIXELS < image.width * image.height <= THUMB_PIXELS
    assert np.asarray(image)[20, 20] == pytest.approx([200, 40, 40], abs=20)


# ---- files ----


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_aside(tmp_path):
    path = tmp_path / "a.jsonl"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(OSError, match=r"a\.jsonl"):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.rglob("*")] == ["a.jsonl", "old"]


def test_half_a_surrogate_pair_from_a_users_row_survives(tmp_path):
    path = tmp_path / "a.jsonl"
    write_atomic(path, json.dumps({"text": "\ud800 é"}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "\ud800 é"}

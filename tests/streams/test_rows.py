"""Rows that no stream can answer: the run's verdict at its start, and that the checker's is the same, row by row."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.data import DataConfig
from conf.jobs import JobConfig
from conf.schema import RunConfig
from conf.training import SftConfig
from evals.stage import ROWS as EVAL
from rewards import RewardConfig, RewardResult
from rewards.scorer import Scorer
from rl.stage import ROWS as RL
from runtime.rows import GOOD_ORACLE, OracleReport, best_oracle, judged, row_texts, tell_oracle, tell_overlap, tell_rows
from sft.stage import ROWS as SFT
from streams.backbone.tiny import QWEN_CONTROL_TOKENS, build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.backbone.vocabulary import text_layout
from streams.data.answerable import read_words, untimely
from streams.data.check import check
from streams.data.dataset import SkippedSample, counted, load_tasks, write_tasks
from streams.data.rows import TaskRows
from streams.layout.layout import STREAMING_TOKENS, LayoutConfig
from streams.messages import RolloutTask
from streams.task import ExpectedAnswer, Plan, Reason, StreamTask, TimedQuery, TimedThought
from tests.support.clips import write_grey_ramp
from tests.support.configs import reward_preset
from tests.support.service import open_service, worker_setup

LAYOUT = LayoutConfig(system_prompt="Watch.", think_budget=6, max_new_tokens=12)
CONFIG = RunConfig(
    job=JobConfig("rl", ["rl"]),
    layout=LAYOUT,
    data=DataConfig(tail_chunks=2, max_turns=8),
    reward=reward_preset("quickstart"),
    sft=SftConfig(late_probability=0.0),
)
USES = {use.name: use for use in (SFT, RL, EVAL)}
LONG = "a red square, a green circle, a blue triangle, a yellow square"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"), TinySpec(hidden=64, layers=2, mlp=128), seed=1)


@pytest.fixture(scope="module")
def layout(checkpoint):
    return text_layout(checkpoint, LAYOUT)


@pytest.fixture(scope="module")
def service(checkpoint):
    service = open_service(worker_setup(checkpoint, layout=LAYOUT, video=CONFIG.data.video))
    yield service
    service.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_grey_ramp(folder / "ten.mp4", 80, 8)
    write_grey_ramp(folder / "four.mp4", 32, 8)
    return folder


def judge(tasks, layout, stage="rl", config=CONFIG):
    words = tuple(read_words(row, layout) for row in row_texts(config, tuple(tasks), USES[stage]))
    return judged(config, TaskRows.of(tasks), words, USES[stage])


def task(*answers, name="a", query="what?", stay_open=True, thoughts=(), end=10.0):
    expected = tuple(ExpectedAnswer(float(time), text, kind) for time, text, kind in answers)
    return StreamTask(name, "/v/ten.mp4", 0.0, end, (TimedQuery(1.0, query, stay_open),), expected, tuple(thoughts))


# ---- one reason after the other ----


def test_a_row_due_after_the_last_turn_is_named_and_stays_as_silence_is_right_until_then(layout):
    late, partly = task((8.5, "red", "text"), name="late"), task((2, "red", "text"), (9, "red", "text"), name="partly")
    for stage in ("rl", "sft"):
        found = judge([late, partly], layout, stage)
        assert ([t.id for t in found.tasks], found.skipped) == (["late", "partly"], ())
        named = [f"task {name} (/v/ten.mp4)" for name in ("late", "partly")]
        assert [(s.source, s.kind) for s in found.kept] == [(name, Reason.AFTER_LAST_TURN) for name in named]
        assert "turn 8, after the stream's last turn 7 (raise data.max_turns=8)" in found.kept[0].reason
    assert judge([late], layout, config=replace(CONFIG, data=DataConfig(max_turns=9))).kept == ()


def test_the_clock_is_that_of_max_chunks(layout):
    video = replace(CONFIG.data.video, max_chunks=5)
    config = replace(CONFIG, data=DataConfig(max_turns=4, video=video))
    found = judge([task((7.9, "red", "text")), task((8.0, "red", "text"), name="b")], layout, config=config)
    assert [sample.source for sample in found.kept] == ["task b (/v/ten.mp4)"]
    assert "in turn 4, after the stream's last turn 3" in found.kept[0].reason


def test_an_answer_longer_than_a_turn_is_left_out_unless_what_fits_is_right(layout):
    plain, choice = task((2, LONG, "text")), task((2, f"B. {LONG}", "choice"), name="choice")
    found = judge([plain, choice], layout)
    assert [t.id for t in found.tasks] == ["choice"]
    assert counted(found.skipped) == {"answer_too_long": 1}
    assert found.fits["choice"][0].startswith("B. a")
    assert LONG.startswith(found.fits["a"][0])
    # A reward that does not compare words may pay for a shorter answer.
    own = RewardConfig("product", {"mine": {"target": "tests.support.noisy_reward:noisy"}})
    assert len(judge([plain], layout, config=replace(CONFIG, reward=own)).tasks) == 1


def test_what_fits_is_as_long_as_the_engine_lets_an_answer_be(layout):
    """4 tokens go to the tags, <response> and the end: an answer of 8 tokens fits into 12, one of 9 does not."""
    words = layout.query_ids(LONG)
    exact, over = (layout.tokenizer.decode(words[:n]) for n in (8, 9))
    assert layout.fitting(exact) is None
    assert layout.fitting(over) == exact.strip()
    assert len(layout.within_budgets("", exact, 0)) == LAYOUT.max_new_tokens
    with pytest.raises(ValueError, match=r"13 tokens, more than layout\.max_new_tokens=12"):
        layout.within_budgets("", over, 0)


def test_thoughts_concern_the_cold_start_alone(layout):
    row = task((2, "red", "text"), thoughts=[TimedThought(3.0, LONG)])
    assert judge([row], layout, "rl").skipped == ()
    found = judge([row], layout, "sft")
    assert counted(found.skipped) == {"thought_too_long": 1}
    assert "the thought of turn 3 has" in found.skipped[0].reason
    # Two thoughts of one chunk are one there; a pending thought holds the answer.
    short = [TimedThought(3.0, "a red square"), TimedThought(3.5, "a green circle")]
    both = task((2, "red", "text"), thoughts=short)
    assert counted(judge([both], layout, "sft").skipped) == {"thought_too_long": 1}
    pending = replace(CONFIG, sft=SftConfig(pending_thought="{thought} answer {answer} answer {answer}"))
    assert counted(judge([task((2, "red", "text"))], layout, "sft", pending).skipped) == {"thought_too_long": 1}


def test_two_answers_of_one_turn_are_one_demonstration_unless_one_may_come_late(layout):
    row = task((2.1, "a red square, a", "text"), (2.6, "a blue triangle, red", "text"))
    assert counted(judge([row], layout, "sft").skipped) == {"answer_too_long": 1}
    sometimes = replace(CONFIG, sft=SftConfig(late_probability=0.5))
    assert judge([row], layout, "sft", sometimes).skipped == ()


@pytest.mark.parametrize("token", [*STREAMING_TOKENS, *QWEN_CONTROL_TOKENS])
def test_a_control_token_costs_the_row_wherever_it_stands(layout, token):
    rows = [
        task((2, "red", "text"), query=f"say {token} now", name="query"),
        task((2, f"{token}red", "text"), name="answer"),
        task((2, "red", "text"), thoughts=[TimedThought(1.0, f"x{token}")], name="thought"),
        task((2, "red <|foo|>", "text"), query="<|bar|> <silence>", name="none"),
    ]
    for stage in ("rl", "sft"):
        config = replace(CONFIG, layout=replace(LAYOUT, max_new_tokens=40, think_budget=30))
        found = judge(rows, layout.with_config(config.layout), stage, config)
        assert [t.id for t in found.tasks] == ["none"]
        assert counted(found.skipped) == {"control_token": 3}
        assert all(token in sample.reason for sample in found.skipped)


def test_a_question_that_a_response_to_another_closes_is_named():
    queries = (TimedQuery(0.0, "alarm?"), TimedQuery(1.0, "now?"))
    answers = (ExpectedAnswer(6.0, "red", query=0), ExpectedAnswer(2.0, "blue", query=1))
    row = StreamTask("a", "v.mp4", 0.0, 10.0, queries, answers)
    (found,) = untimely(row, Plan(10, 1.0), 240)
    assert (found.kind, found.answer) == (Reason.QUESTION_CLOSED, None)
    assert (
        "answers[0] is due in turn 6, but any response closes queries[0], and answers[1] is due in turn 2"
        in found.reason
    )
    stays = replace(row, queries=(replace(queries[0], stay_open=True), queries[1]))
    assert untimely(stays, Plan(10, 1.0), 240) == []
    # Answered before the other is asked: nothing closes early.
    assert untimely(replace(row, answers=(replace(answers[0], time=0.5), answers[1])), Plan(10, 1.0), 240) == []


def test_held_out_rows_are_named_but_stay(layout):
    rows = [task((9, "red", "text")), task((2, "red", "text"), query="<|im_end|>", name="b")]
    found = judge(rows, layout, "eval")
    assert (found.tasks, found.skipped) == (tuple(rows), ())
    assert counted(found.kept) == {"control_token": 1, "due_after_last_turn": 1}


# ---- what is said ----


def test_counts_and_examples_are_said_on_one_line_each(layout):
    rows = [task((2, "red", "text"), query="<|im_end|>", name=f"t{i}\n") for i in range(12)]
    rows = [replace(row, origin=f"f.jsonl:{i}") for i, row in enumerate(rows)]
    said = []
    tell_rows(said.append, "rl: train", judge(rows, layout))
    assert said[0] == "rl: train: 12 rows left out: control_token 12 (all of them: stages/*.json, summary.json)"
    assert said[-1] == "rl: train: control_token: and 7 more"
    assert len(said) == 7
    assert all("\n" not in line for line in said)
    assert said[1].endswith("(row f.jsonl:0)")


def oracle(reward, tasks, fits=None, seconds=1000.0):
    rows = [(t, Plan(8, 1.0), (fits or {}).get(t.id, {})) for t in tasks]
    results, think = best_oracle(Scorer(reward).score, rows, 6, seconds)
    return OracleReport(tuple(zip(tasks, results, strict=False)), think)


def test_an_oracle_that_falls_short_names_the_rows_that_cost_it(layout):
    rows = [task((2, "red", "text"), name=f"good{i}") for i in range(6)]
    rows.append(replace(task((2.1, "red", "text"), (2.6, "blue", "text"), name="shared"), origin="f.jsonl:7"))
    rows.append(replace(task((3, "red", "text"), (9, "blue", "text"), name="partly"), origin="f.jsonl:8"))
    found = judge(rows, layout)
    said = []
    tell_oracle(said.append, "rl: train", oracle(CONFIG.reward, found.tasks), found)
    assert "earns 0.922 of 1 over 8 rows. 2 rows cost it" in said[0]
    assert said[1].startswith("rl: train: task partly earns 0.500: due_after_last_turn: answers[1] ")
    assert said[2].startswith("rl: train: task shared earns 0.875: turn_shared: answers[1] ")
    assert said[2].endswith("(row f.jsonl:7)")
    good = judge(rows[:6], layout)
    quiet = []
    tell_oracle(quiet.append, "rl: train", oracle(CONFIG.reward, good.tasks), good)
    assert quiet == []


def test_the_oracle_says_what_a_turn_can_hold(layout):
    rows = [task((2, LONG, "text"), name="text"), task((2, f"B. {LONG}", "choice"), name="choice")]
    found = judge(rows, layout, "eval")
    report = oracle(CONFIG.reward, found.tasks, found.fits)
    assert [result.total for _, result in report.played] == [0.0, 1.0]


def test_the_oracle_thinks_where_the_reward_pays_for_it():
    """The published reward pays for thoughts: an oracle without any would earn 0.8."""
    terms = {
        "format": {"weight": 0.2},
        "thinkstream_time": {"weight": 0.2},
        "thinkstream_correctness": {"weight": 0.4},
        "thinkstream_efficiency": {"weight": 0.2, "budget": 6},
    }
    rows = [task((2, "B", "choice"))]
    score = Scorer(RewardConfig("weighted_sum", terms)).score
    (result,), think = best_oracle(score, [(rows[0], Plan(8, 1.0), {})], 20, 1000.0)
    assert (result.total, think) == (1.0, 20)
    # Where thoughts cost, it does without.
    costs = RewardConfig("product", {"correctness": {}, "think_length": {"budget": 3}})
    assert oracle(costs, rows).think_tokens == 0
    assert oracle(costs, rows).reward == 1.0


def test_a_reward_that_raises_on_a_row_is_named_and_costs_that_row(monkeypatch, layout):
    rows = [replace(task((2, "red", "text"), name=name), origin=f"f.jsonl:{name}") for name in ("1", "2")]
    reward = RewardConfig("product", {"mine": {"target": "tests.streams.test_rows:fails_on_1"}})
    said = []
    found = judge(rows, layout)
    tell_oracle(said.append, "rl: train", oracle(reward, found.tasks), found)
    assert "the reward failed on 1 of 2 rows" in said[0]
    assert "KeyError: 'gone'" in said[0]
    assert "(row f.jsonl:1)" in said[0]
    assert "earns 0.500 of 1" in said[1]


def test_an_oracle_that_thinks_does_not_ask_a_reward_again_that_failed_on_a_row():
    """It may have cost a scorer, or minutes."""
    asked: list[tuple[str, int]] = []

    def score(jobs):
        given = [(job.task.id, job.turns[0][0].think_tokens) for job in jobs]
        asked.extend(given)
        failed = {"1": "a scorer died"}
        return [(RewardResult(bool(think) * 1.0, {}, (), failed.get(name)),) for name, think in given]

    rows = [(task((2, "red", "text"), name=str(i)), Plan(8, 1.0), {}) for i in range(3)]
    results, think = best_oracle(score, rows, 6, 1000.0)
    assert asked == [("0", 0), ("1", 0), ("2", 0), ("0", 6), ("2", 6)]
    assert think == 6
    assert [(result.total, result.failed) for result in results] == [(1.0, None), (0.0, "a scorer died"), (1.0, None)]


def fails_on_1(outcome):
    if outcome.task.id == "1":
        raise KeyError("gone")
    return [1.0 for _ in outcome.task.answers]


def test_a_slow_reward_is_played_over_as_many_rows_as_there_is_time_for(layout):
    rows = tuple(task((2, "red", "text"), name=str(i)) for i in range(500))
    report = oracle(RewardConfig("product", {"mine": {"target": "tests.streams.test_rows:slow"}}), rows, seconds=0.2)
    assert 0 < len(report.played) < 100
    said = []
    tell_oracle(said.append, "rl: train", report, judge(rows, layout))
    assert f"over {len(report.played)} rows of 500" in said[0]
    assert report.reward < GOOD_ORACLE


def slow(outcome):
    import time

    time.sleep(0.005)
    return [0.5 for _ in outcome.task.answers]


def test_held_out_questions_that_are_trained_on_are_counted(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "ten.mp4")
    train = [replace(task((2, "red", "text")), video=str(tmp_path / "ten.mp4"), origin="train.jsonl:1")]
    same = replace(train[0], id="same", video=str(tmp_path / "link.mp4"), origin="heldout.jsonl:4")
    other = replace(same, id="other", queries=(TimedQuery(1.0, "who?"),))
    said = []
    tell_overlap(said.append, tuple(train), (other, same))
    assert said[0].startswith("warning: 1 of 2 held-out rows ask what a training row asks about the same video")
    assert "same (row heldout.jsonl:4) and a (row train.jsonl:1)" in said[0]
    tell_overlap(said.append, tuple(train), (other,))
    assert len(said) == 1


# ---- the line of a row ----


def test_a_task_knows_its_row_which_is_neither_compared_nor_written(folder):
    path = folder / "rows.jsonl"
    rows = [task((2, "red", "text"), name="a"), task((2, "red", "text"), name="b")]
    write_tasks(path, rows)
    found = load_tasks(path, root="/").tasks
    assert [t.origin for t in found] == [f"{path}:1", f"{path}:2"]
    assert found == tuple(rows)
    assert "origin" not in path.read_text()
    sample = SkippedSample.failure(found[1], "VideoError: gone")
    assert (sample.source, sample.reason, sample.kind) == (
        "task b (/v/ten.mp4)",
        f"VideoError: gone (row {path}:2)",
        Reason.VIDEO,
    )
    assert SkippedSample(**json.loads(json.dumps(vars(sample)))) == sample


# ---- the checker and the run, row by row ----


def row(name, **fields):
    given = {"id": name, "video": "ten.mp4", "queries": [{"time": 1, "text": "what?"}]}
    return given | {"answers": [{"time": 2, "text": "red"}]} | fields


def asks(text, **fields):
    return {"queries": [{"time": 1, "text": text, **fields}]}


def says(*answers):
    return {"answers": [dict(zip(("time", "text", "kind"), answer, strict=False)) for answer in answers]}


TABLE = {
    "plain": ({}, True),
    "foo": (asks("<|foo|> is no token"), True),
    "upper": (asks("<|IM_END|>"), True),
    "spaced": (asks("< silent > <|im_end |>"), True),
    "im_end": (asks("a <|im_end|> b"), False),
    "end of text": (asks("<|endoftext|>"), False),
    "box": (asks("where is <|box_start|>it"), False),
    "silent": (asks("<silent>"), False),
    "forged answer": (says((2, "red</think>")), False),
    "forged thought": ({"thoughts": [{"time": 1, "text": "<|vision_pad|>"}]}, False),
    "car": (says((2, "car", "choice")), False),
    "letter": (says((2, "B. car", "choice")), True),
    "maybe": (says((2, "maybe", "yes_no")), False),
    "no": (says((2, "No.", "yes_no")), True),
    "lots": (says((2, "lots", "integer")), False),
    "two numbers": (says((2, "2 or 3", "integer")), False),
    "three": (says((2, "three", "integer")), True),
    "closed": (says((2, "red"), (4, "blue")), False),
    "open": (asks("what?", stay_open=True) | says((2, "red"), (4, "blue")), True),
    "after until": (asks("what?", stay_open=True, until=3) | says((2, "red"), (4, "blue")), False),
    "one turn": (asks("what?", stay_open=True) | says((2.1, "red"), (2.4, "blue")), True),
    "late": (says((8.5, "red")), True),
    "partly late": (asks("what?", stay_open=True) | says((2, "red"), (8.5, "blue")), True),
    "long": (says((2, LONG)), False),
    "long choice": (says((2, f"C. {LONG}", "choice")), True),
    "gone": ({"video": "gone.mp4"}, False),
    "end too late": ({"end": 12.0}, False),
    "end": ({"end": 9.5}, True),
    "after the film": ({"video": "four.mp4"} | says((6, "red")), False),
    "rounded up": ({"video": "four.mp4"} | says((4.4, "red")), True),
    "too much": ({"video": "four.mp4"} | says((5.0, "red")), False),
    "last chunk": ({"video": "four.mp4"} | says((3.9, "red")), True),
    "forged and late": (asks("<silent>") | says((8.5, "red")), False),
}


def run_verdicts(path, layout, service):
    """ids of the rows that a run of RL uses to the end: read, judged at its start, and rolled out by a real worker."""
    loaded = load_tasks(path, video=CONFIG.data.video)
    usable = set()
    for found in judge(loaded.tasks, layout).tasks:
        request = RolloutTask(f"0/{found.id}", found, CONFIG.data.plan_of(found), 1, 1.0)
        summary, _ = service.submit(request).result(timeout=60)
        usable |= set() if summary.failed else {found.id}
    return usable


def test_checker_and_run_agree_on_every_row(folder, layout, service):
    path = folder / "table.jsonl"
    path.write_text("\n".join(json.dumps(row(name, **fields)) for name, (fields, _) in TABLE.items()))
    found = check(path, max_turns=CONFIG.data.max_turns, layout=layout)
    checked = {task.id for task in found.usable}
    ran = run_verdicts(path, layout, service)
    for name, (_, usable) in TABLE.items():
        assert (name in checked, name in ran) == (usable, usable), name
    # Every row that is left out or warned about is named by its line.
    lines = {name: f"{path}:{i + 1}" for i, name in enumerate(TABLE)}
    skipped = {sample.source.partition(": ")[0] for sample in found.skipped}
    assert skipped == {lines[name] for name, (_, usable) in TABLE.items() if not usable}
    assert {sample.source.partition(": ")[0] for sample in found.warned} == {
        lines[name] for name in ("one turn", "late", "partly late")
    }


def test_what_a_rows_check_refuses_for_a_token_the_worker_refuses_too(folder, layout, service):
    """Without the check at the start, the same worker takes or refuses the same questions."""
    path = folder / "asked.jsonl"
    names = [name for name, (fields, _) in TABLE.items() if set(fields) == {"queries"}]
    path.write_text("\n".join(json.dumps(row(name, **TABLE[name][0])) for name in names))
    for found in load_tasks(path).tasks:
        summary, _ = service.submit(RolloutTask(f"1/{found.id}", found, Plan(3, 1.0), 1, 1.0)).result(timeout=60)
        assert (summary.failed is None) == TABLE[found.id][1], (found.id, summary.failed)


WORDS = st.sampled_from(
    [
        *STREAMING_TOKENS,
        *QWEN_CONTROL_TOKENS,
        "<|foo|>",
        "<|",
        "|>",
        "<",
        ">",
        "think",
        "im_end",
        "red",
        " ",
        "B",
        "yes",
        "3",
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def random_rows(draw):
    stays = draw(st.booleans())
    query = {"time": draw(st.floats(0, 3)), "text": draw(TEXTS), "stay_open": stays}
    if stays and draw(st.booleans()):
        query["until"] = draw(st.floats(3.5, 12.0))
    kinds = st.sampled_from(["choice", "yes_no", "integer", "text"])
    due = st.floats(3.0, 9.9)
    answers = [{"time": draw(due), "text": draw(TEXTS), "kind": draw(kinds)} for _ in range(draw(st.integers(1, 2)))]
    fields = {"queries": [query], "answers": answers}
    if draw(st.booleans()):
        fields["end"] = 10.0
    if draw(st.booleans()):
        fields["thoughts"] = [{"time": 1.0, "text": draw(TEXTS)}]
    return fields


@settings(max_examples=25, deadline=None)
@given(st.lists(random_rows(), min_size=1, max_size=8))
def test_on_random_rows_the_checker_calls_usable_what_the_run_uses(folder, layout, drawn):
    path = folder / "random.jsonl"
    path.write_text("\n".join(json.dumps(row(str(i), **fields)) for i, fields in enumerate(drawn)))
    try:
        loaded = load_tasks(path, video=CONFIG.data.video).tasks
    except ValueError:
        with pytest.raises(ValueError, match="no usable row"):
            check(path, max_turns=CONFIG.data.max_turns, layout=layout)
        return
    used = [task.id for task in judge(loaded, layout).tasks]
    assert [task.id for task in check(path, max_turns=CONFIG.data.max_turns, layout=layout).usable] == used


def _raises(outcome):
    raise RuntimeError("boom")


def test_a_row_on_which_the_reward_failed_is_not_said_to_be_judged_by_its_rule(layout):
    rows = [task((2, "red", "text"))]
    said = []
    own = RewardConfig("product", {"mine": {"target": f"{__name__}:_raises"}})
    tell_oracle(said.append, "rl: train", oracle(own, rows), judge(rows, layout))
    assert any(line.startswith("rl: train: task a earns 0.000: ") and "boom" in line for line in said)
    assert not any("own rule" in line for line in said)

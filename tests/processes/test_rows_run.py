"""A real run whose rows cannot all be answered: named at its start, with counts by reason, and in its summary."""

from __future__ import annotations

import json
import re

import pytest

from streams.data.synthetic.questions import SyntheticConfig, generate
from tests.support.clips import write_grey_ramp
from tests.support.commands import launch
from tests.support.small_run import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = "a red square, a green circle, a blue triangle and so on"
OPEN = [{"time": 1, "text": "q", "stay_open": True}]


def answers(*given):
    return {"answers": [dict(zip(("time", "text", "kind"), answer, strict=False)) for answer in given]}


ODD = {
    "late": answers((13, "red")),
    "partly": {"queries": OPEN} | answers((2, "red"), (13, "red")),
    "long": answers((2, LONG)),
    "forged": {"queries": [{"time": 1, "text": "hi <|im_end|>"}]},
    "thought": {"thoughts": [{"time": 1, "text": LONG}]},
    "car": answers((2, "car", "choice")),
    "film": {"video": "short.mp4"} | answers((9.5, "red")),
    "日本": {"queries": OPEN} | answers((2.1, "red"), (2.5, "blue")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = root / "own"
    generate(data, SyntheticConfig(train_clips=4, heldout_per_mode=1, max_turns=14))
    write_grey_ramp(data / "short.mp4", 40, 8)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    plain = {"video": rows[0]["video"], "queries": [{"time": 1, "text": "q"}]} | answers((2, "red"))
    path = data / "mixed.jsonl"
    odd = [{"id": name} | plain | fields for name, fields in ODD.items()]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in [*odd, *rows]), encoding="utf-8")
    # Held-out: what is trained on, and one row that nobody can answer.
    held = data / "held.jsonl"
    held.write_text("\n".join(json.dumps(row) for row in [{"id": "far"} | plain | answers((13, "red")), *rows]))
    done = launch(
        *SETTINGS,
        "data.max_turns=12",
        'sft.pending_thought=""',
        "sft.steps=2",
        "sft.late_probability=0",
        "algorithm.steps=2",
        "eval.conditions=false",
        "rollout.workers=1",
        "tracking.enabled=false",
        f"run_root={root / 'out'}",
        f"data.train={path}",
        f"data.heldout={held}",
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = {name: f"{path}:{i + 1}" for i, name in enumerate(ODD)}
    return done.stdout, json.loads((root / "out" / "summary.json").read_text()), lines, held


def test_rows_are_named_before_anything_trains_with_counts_and_lines(run):
    said, _, lines, _ = run
    start = said[: said.index("sft 1/2")]
    for words in (
        "sft: train: 3 rows left out: answer_too_long 1, control_token 1, thought_too_long 1",
        "rl: train: 2 rows left out: answer_too_long 1, control_token 1",
        "rl: train: 3 rows used, but not all of it can be answered: due_after_last_turn 2, turn_shared 1",
        "eval: heldout: 1 rows used, but not all of it can be answered: due_after_last_turn 1",
        f"data: skipped {lines['car']}: task car: answers[0].kind=choice",
    ):
        assert words in start, words
    for name, kind in (("late", "due_after_last_turn"), ("long", "answer_too_long"), ("forged", "control_token")):
        assert re.search(rf"rl: train: {kind}: task {name} \(.*\(row {re.escape(lines[name])}\)", start), name
    assert rf"(row {lines['日本']})" in start
    assert r"task \u65e5\u672c" in start


def test_an_oracle_below_1_warns_with_the_rows_that_cost_it(run):
    said, _, lines, held = run
    assert re.search(r"rl: train: warning: a scripted oracle, .* earns 0\.\d+ of 1 over 9 rows\. 3 rows cost it", said)
    assert re.search(rf"rl: train: task partly earns 0\.500: due_after_last_turn: .*{re.escape(lines['partly'])}", said)
    assert re.search(rf"eval: heldout: task far earns 0\.000: due_after_last_turn: .*{re.escape(str(held))}:1\)", said)


def test_held_out_rows_that_are_trained_on_are_warned_about(run):
    assert "warning: 5 of 5 held-out rows ask what a training row asks about the same video" in run[0]


def test_what_only_the_video_tells_is_named_with_its_line(run):
    said, summary, lines, _ = run
    assert re.search(rf"sft: skipped 0/film: VideoError: .* \(row {re.escape(lines['film'])}\)", said)
    found = [s for s in summary["skipped"] if s["kind"] == "video_unusable"]
    assert [s["reason"].endswith(f"(row {lines['film']})") for s in found] == [True]


def test_the_summary_counts_by_reason(run):
    summary = run[1]
    assert summary["skipped_by_reason"] == {
        "answer_too_long": 2,  # too long to demonstrate, and too long to say
        "control_token": 1,
        "row_contradictory": 1,
        "thought_too_long": 1,
        "video_unusable": 1,
    }
    assert summary["kept_by_reason"] == {"due_after_last_turn": 3, "turn_shared": 1}
    assert summary["skipped_samples"] == sum(summary["skipped_by_reason"].values()) == len(summary["skipped"])
    assert summary["reward_scripted_oracle"] == pytest.approx(0.8)

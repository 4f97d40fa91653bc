"""The summary of an evaluation: any category, any checkpoint, and nothing of a training that it does not come from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from evals.heldout import ScoredStream, collect
from evals.job import metric_name
from evals.summary import (
    checkpoint_label,
    heldout_fields,
    print_table,
    stages_behind,
    training_fields,
)
from rewards.compose import AnswerResult, RewardResult
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery

pytestmark = pytest.mark.smoke

MODES = ("now", "recall", "alert")


def result(*answers: tuple[str, bool], failed: int = 0):
    """An evaluation with one stream per (category, correct); the first `failed` of them could not be run."""
    streams = []
    for i, (category, correct) in enumerate(answers):
        question = (TimedQuery(1.0, "?"),), (ExpectedAnswer(2.0, "red"),)
        task = StreamTask(f"t{i}", "a.mp4", 0.0, 4.0, *question, category=category)
        got = AnswerResult(0, category, 2, 2, correct, 1.0, float(correct))
        streams.append(
            ScoredStream(
                task, Plan(4, 1.0), (), RewardResult(float(correct), {}, (got,)), i, "broken" if i < failed else None
            )
        )
    return collect("trained", tuple(streams))


def printed(summary: dict) -> list[str]:
    stream = io.StringIO()
    print_table(Console(file=stream, width=100), summary)
    return stream.getvalue().splitlines()


def row(lines: list[str], label: str) -> list[str]:
    return next(
        cells[2:-1] for line in lines if len(cells := [c.strip() for c in line.split("│")]) > 2 and cells[1] == label
    )


def test_categories_of_the_users_own_are_in_the_summary_and_in_the_table():
    sft = result(("cooking", True), ("[red]odd[/]", False), ("now", True), ("", True))
    rl = result(("cooking", False), ("[red]odd[/]", True), ("now", True), ("", True))
    fields = heldout_fields({"sft": sft, "rl": rl})
    wanted = {"[red]odd[/]": 1.0, "cooking": 0.0, "now": 1.0, "uncategorised": 1.0}
    assert fields["evaluations"]["rl"]["accuracy_by_category"] == wanted
    assert fields["evaluations"]["rl"]["n_by_category"] == dict.fromkeys(wanted, 1)
    lines = printed(fields)
    assert row(lines, "cooking") == ["1.000", "0.000"]
    assert row(lines, "[red]odd[/]") == ["0.000", "1.000"]
    assert row(lines, "uncategorised") == ["1.000", "1.000"]
    labels = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert labels[3] == "now", "the known modes come first"
    assert "recall" not in labels, "what nobody asked is no row"


def test_a_category_called_all_does_not_pass_for_the_mean_over_all():
    found = result(("all", False), ("now", True), ("now", True))
    assert found.accuracy == {"all (category)": 0.0, "now": 1.0, "all": pytest.approx(2 / 3)}
    assert "all" not in heldout_fields({"rl": found})["evaluations"]["rl"]["accuracy_by_category"]


def test_the_quickstarts_keys_stay_as_they_are():
    results = {
        "sft": result(("now", True), ("recall", False), ("alert", True)),
        "rl": result(("now", True), ("recall", True), ("alert", True)),
        "empty_thoughts": result(("recall", False)),
        "recent_frames": result(("recall", True)),
    }
    fields = heldout_fields(results)
    assert [fields[f"accuracy_{mode}"] for mode in MODES] == [1.0, 1.0, 1.0]
    assert [fields[f"accuracy_{mode}_sft"] for mode in MODES] == [1.0, 0.0, 1.0]
    assert (fields["accuracy_recall_empty_thoughts"], fields["accuracy_recall_recent_frames"]) == (0.0, 1.0)
    assert (fields["heldout_n"], fields["heldout_n_by_mode"]) == (3, dict.fromkeys(MODES, 1))
    assert fields["gap_closed"] == 1.0


def test_another_checkpoint_has_a_column_of_its_own_and_leaves_this_runs_fields_empty():
    fields = heldout_fields({"my-model": result(("now", True), ("now", False), failed=1)})
    assert {fields[f"accuracy_{mode}{suffix}"] for mode in MODES for suffix in ("", "_sft")} == {None}
    assert (fields["heldout_reward_rl"], fields["heldout_reward_sft"], fields["heldout_n"]) == (None, None, 2)
    assert fields["evaluations"]["my-model"]["accuracy"] == 0.5
    assert fields["evaluations"]["my-model"]["failed_streams"] == 1
    lines = printed(fields)
    assert any("my-model" in line for line in lines)
    assert not any("after RL" in line or "recall" in line for line in lines)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/runs/a/checkpoints/rl/final/hf", "rl-final"),
        ("/runs/a/checkpoints/rl/step000020/hf", "rl-step000020"),
        ("/runs/a/checkpoints/sft/hf", "checkpoint-sft"),
        ("models/my model (v2)", "my_model_v2"),
        ("models/模型", "checkpoint"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-3B-Instruct"),
        ("recent_frames", "checkpoint-recent_frames"),
        ("x/..", "x"),
    ],
)
def test_a_checkpoint_gives_its_results_a_name_that_a_run_never_uses_itself(path, label):
    found = checkpoint_label(path)
    assert found == label
    assert "/" not in found


def test_only_stages_that_made_a_checkpoint_lend_their_fields_to_its_summary(tmp_path):
    made = tmp_path / "checkpoints"
    assert stages_behind(tmp_path, [made / "sft" / "hf"]) == ("sft",)
    assert stages_behind(tmp_path, [made / "rl" / "final" / "hf"]) == ("sft", "rl")
    assert stages_behind(tmp_path, [made / "sft" / "hf", made / "rl" / "final" / "hf"]) == ("sft", "rl")
    assert stages_behind(tmp_path, [tmp_path / "other" / "checkpoints" / "rl" / "final" / "hf"]) == ()
    assert stages_behind(tmp_path, [Path("Qwen/Qwen2.5-VL-3B-Instruct")]) == ()


def test_fields_of_a_training_are_null_without_one():
    rl = {"steps": 4, "max_age": 1, "versions_seen": [1, 2], "age0": {"max": 1e-6, "tokens": 7}}
    fields = training_fields(rl)
    assert (fields["learner_steps"], fields["max_age"], fields["weight_versions_seen"]) == (4, 1, 2)
    assert (fields["age0_max_abs_logp_diff"], fields["age0_logp_diff_tokens"]) == (1e-6, 7)
    empty = training_fields({})
    assert empty.keys() == fields.keys()
    assert {value for key, value in empty.items() if not key.endswith("tokens")} == {None}
    assert json.loads(json.dumps(fields)) == fields


def test_a_category_that_would_clear_the_terminal_is_shown_and_takes_one_row():
    summary = heldout_fields({"sft": result(("\x1b[2Jgone", True), ("two\nlines", False), ("颜色", True))})
    lines = printed(summary)
    assert not any("\x1b[2J" in line for line in lines)
    assert row(lines, "\\x1b[2Jgone") == ["1.000"]
    assert row(lines, "two\\nlines") == ["0.000"]
    assert row(lines, "颜色") == ["1.000"]
    assert "\x1b[2Jgone" in summary["evaluations"]["sft"]["accuracy_by_category"], "as the rows have it"


def test_any_category_becomes_a_metric_name_that_trackers_take():
    from mlflow.utils.validation import _validate_metric_name

    for category in ("now", "what/why?", "Frage: wo", "模型", "a&b=<c>"):
        name = metric_name(f"eval_rl/accuracy_{category}")
        assert name.startswith("eval_rl/accuracy_")
        _validate_metric_name(name)

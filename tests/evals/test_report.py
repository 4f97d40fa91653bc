"""Comparing runs on their held-out streams: intervals, which streams count, what is said, and files that are none."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.compare import METRICS, difference, mean, of_category, paired
from evals.report import main
from evals.results import FOLDER, Kept, StreamScore, read_result
from streams.support.files import write_json

PRODUCT = {"combine": "product", "terms": {"correctness": {}}}


def stream(i, reward=0.5, right=1, questions=2, category="recall", asked="q"):
    return StreamScore(f"clip{i}", asked, category, reward, reward * questions, right, questions)


STREAMS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(1, 3), st.floats(0, 1)).map(lambda t: (t[0], round(t[1] * t[2]), t[1])),
    min_size=1,
    max_size=12,
)


def made(values):
    return [stream(i, *value) for i, value in enumerate(values)]


# --- estimates --------------------------------------------------------------------------------------------------------


def test_means_by_hand():
    streams = [stream(0, 1.0, 2, 2), stream(1, 0.0, 0, 1), stream(2, 0.5, 1, 1)]
    found = {metric: mean(streams, metric).value for metric in METRICS}
    assert found == {"reward": 0.5, "timing": pytest.approx(2.5 / 4), "accuracy": 0.75}
    assert mean([], "reward") is None
    assert mean([stream(0, questions=0)], "accuracy") is None


def test_an_interval_is_the_bootstraps_of_a_known_distribution():
    """Of 400 fair coins the mean's standard deviation is 0.025: 95 % lie within 1.96 of it."""
    streams = [stream(i, float(i % 2)) for i in range(400)]
    found = mean(streams, "reward")
    assert found.value == 0.5
    assert (found.low, found.high) == (pytest.approx(0.451, abs=0.003), pytest.approx(0.549, abs=0.003))


@given(STREAMS)
def test_an_interval_holds_its_mean_and_no_difference_is_seen_between_equals(values):
    streams = made(values)
    for metric in METRICS:
        found = mean(streams, metric)
        assert found.low - 1e-12 <= found.value <= found.high + 1e-12
        assert mean(streams, metric) == found
        same = difference(paired(streams, streams), metric)
        assert (same.value, same.low, same.high, same.shown) == (0, 0, 0, False)


def test_what_is_hard_for_both_does_not_count_twice():
    """Streams differ widely, and the second result is a little better on each: a pair shows it, two intervals would not."""
    easy = np.linspace(0, 0.9, 40)
    before, after = (made([(float(e) + plus, 1, 2) for e in easy]) for plus in (0.0, 0.02))
    found = difference(paired(before, after), "reward")
    assert found.value == pytest.approx(0.02)
    assert found.shown
    assert found.high - found.low < 1e-9
    assert mean(before, "reward").high > mean(after, "reward").low


def test_a_stream_is_drawn_with_all_of_its_questions():
    """Two streams of a hundred questions each are two draws and not two hundred."""
    found = mean([stream(0, 1.0, 100, 100), stream(1, 0.0, 0, 100)], "accuracy")
    assert (found.low, found.value, found.high) == (0.0, 0.5, 1.0)


def test_streams_are_the_same_if_they_are_called_and_asked_the_same():
    before = [stream(0), stream(1), stream(2, asked="other"), stream(3, category="count")]
    after = [stream(3, 0.75, category="count"), stream(2), stream(0, 1.0)]
    pair = paired(before, after)
    assert [s.task for s in pair.before] == [s.task for s in pair.after] == ["clip0", "clip3"]
    assert pair.left_out == 3
    assert difference(pair, "reward").value == pytest.approx(0.375)
    assert difference(of_category(pair, "count"), "reward").value == pytest.approx(0.25)
    assert difference(paired(before, []), "reward") is None


# --- the report -------------------------------------------------------------------------------------------------------


def write(root, name, streams, reward=PRODUCT):
    kept = {"format": 1, "result": name, "reward": reward, "streams": [asdict(s) for s in streams]}
    write_json(root / FOLDER / f"{name}.json", kept)
    return root


def many(reward, seed, count=60):
    rng = np.random.default_rng(seed)
    return made([(float(np.clip(reward + 0.1 * rng.standard_normal(), 0, 1)), 1, 2) for _ in range(count)])


def said(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_runs_are_compared_with_the_first_one(tmp_path, capsys):
    a = write(write(tmp_path / "a", "sft", many(0.2, 0)), "rl", many(0.5, 1))
    b = write(tmp_path / "b", "rl", many(0.7, 2))
    c = write(tmp_path / "c", "rl", many(0.5, 3))
    out = said(capsys, a, b, c)
    assert f"{b} rl is better than {a} rl (by reward)" in out
    assert f"no difference is shown between {c} rl and {a} rl (by reward)" in out
    assert "accuracy: +0.000 (+0.000 to +0.000)" in out
    out = said(capsys, b, a)
    assert f"{a} rl is worse than {b} rl" in out
    out = said(capsys, a)
    assert "rl is better than sft" in out
    assert "sft is" not in out
    out = said(capsys, a, a, "--result", "sft")
    assert "no difference is shown between sft and sft" in out


def test_what_stands_in_the_way_of_a_comparison_is_said(tmp_path, capsys):
    a = write(tmp_path / "a", "rl", many(0.5, 1, 20))
    failed = [replace(s, failed=i < 2, category="[red]") for i, s in enumerate(many(0.9, 1, 25))]
    b = write(tmp_path / "b", "rl", [*failed[:24], stream(99)], {"combine": "weighted_sum", "terms": {"timing": {}}})
    out = said(capsys, a, b)
    assert "5 streams that only one of the two watched are left out" in out
    assert "with 20 streams the intervals are too narrow to be trusted" in out
    assert "their rewards are defined differently: accuracy decides" in out
    assert "2 streams failed, and count as silent" in out
    assert "(by accuracy)" in out
    other = write(tmp_path / "c", "rl", [stream(0, asked="another")])
    assert f"{other} rl and {a} rl have no stream in common" in said(capsys, a, other)


def test_the_report_as_json(tmp_path, capsys):
    a, b = write(tmp_path / "a", "rl", many(0.5, 1)), write(tmp_path / "b", "rl", many(0.7, 2))
    made_ = json.loads(said(capsys, a, b, "--json", "-"))
    (comparison,) = made_["comparisons"]
    assert (comparison["verdict"], comparison["by"]) == ("better", "reward")
    assert 0.1 < comparison["reward"]["low"] < comparison["reward"]["value"] < comparison["reward"]["high"] < 0.3
    assert comparison["reward"]["streams"] == 60
    assert comparison["accuracy_by_category"] == {}, "there is one category only"
    out = said(capsys, a, b, "--json", tmp_path / "new" / "report.json")
    assert "is better than" in out
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == made_


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no result of an evaluation"),
        ('{"format": 2}', "it has format 2, known is 1"),
        ('{"format": 1, "result": "rl", "reward": {}}', "'streams'"),
        ('{"format": 1, "result": "rl", "reward": {}, "streams": [{"task": "a"}]}', "missing"),
        ("[]", "is no result"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, text, says):
    path = tmp_path / FOLDER / "rl.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert says in told


def test_a_run_without_results_and_a_result_that_it_lacks_are_named(tmp_path, capsys):
    a = write(tmp_path / "a", "sft", [stream(0)])
    for words, says in (
        ([tmp_path / "b"], "it is no run_root, or"),
        ([a, "--result", "rl"], "there is no result 'rl', only sft"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
    assert read_result(a / FOLDER / "sft.json") == Kept("sft", PRODUCT, (stream(0),))
    with pytest.raises(ValueError, match="cannot be read"):
        read_result(tmp_path / "none.json")

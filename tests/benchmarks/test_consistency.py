"""benchmarks.consistency: every policy and backbone is exact, every planted defect is caught, and the command can say no."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import consistency
from tests.support.exactness import rows
from tests.support.exactness.backbones import MODEL_TYPES, loud_backbone
from tests.support.exactness.defects import DEFECTS, NOT_APPLICABLE, LateEnd
from tests.support.exactness.rows import (
    DEFECT_BAR,
    FULL,
    POLICIES,
    QUICK,
    Measured,
    check_counted_once,
    check_positions,
    figures,
)
from tests.support.exactness.streams import random_requests, run

KEYS = ["policy", "backbone", "positions", "dtype", "tokens", "evicted", "mean", "p99", "max", "defects"]
NAN = float("nan")


def command(*arguments: str) -> tuple[int, dict, str]:
    """(exit status, the JSON of the last line, what was printed before)."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = consistency.main([*arguments, "--json", "-"])
    *text, last = out.getvalue().strip().split("\n")
    return status, json.loads(last), "\n".join(text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_policy_on_both_backbones_reaches_every_bar():
    status, report, text = command("--quick")
    assert status == 0, text
    assert list(report) == ["rows", "ok"]
    assert report["ok"] is True
    names = [(row["policy"], row["positions"], row["backbone"], row["dtype"]) for row in report["rows"]]
    expected = {(p.name, p.positions, b, d) for p in POLICIES for b in MODEL_TYPES for d in ("fp64", "fp32")}
    assert set(names) == expected
    assert len(names) == len(expected)
    for row in report["rows"]:
        assert list(row) == KEYS
        assert row["tokens"] >= QUICK.tokens
        assert (row["evicted"] > 0) == (row["policy"] != "full")
        null = {name for name, value in row["defects"].items() if value is None}
        assert null == set(NOT_APPLICABLE.get(row["policy"], {}))
        if row["dtype"] == "fp64":
            assert row["max"] <= 1e-10
            assert all(value > 1e-7 for value in row["defects"].values() if value is not None)
    assert "every bar reached" in text
    for reasons in NOT_APPLICABLE.values():
        assert all(why in text for why in reasons.values())


@pytest.mark.slow
def test_an_engine_with_a_defect_fails_the_command(monkeypatch):
    monkeypatch.setattr(rows, "run", partial(run, engine_type=LateEnd))
    status, report, text = command("--quick", "--policies", "recent_frames", "--backbones", "qwen2_5_vl")
    assert status == 1
    assert report["ok"] is False
    assert "MISSED recent_frames qwen2_5_vl native fp64: max" in text
    assert "MISSED recent_frames qwen2_5_vl native fp32: max" in text


GOOD = Measured(
    *("rcsm", "qwen2_5_vl", "native", "fp64"),
    tokens=QUICK.tokens,
    evicted=7,
    mean=1e-15,
    p99=1e-14,
    max=1e-14,
    defects=dict.fromkeys(DEFECTS, 0.1),
    k3=1e-29,
    video_evicted=0.6,
    by_kind={},
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max": 2e-10}, "max 2e-10 is not within 1e-10"),
        ({"max": NAN}, "max nan is not within"),
        ({"max": None, "mean": None, "tokens": 0}, "max None is not within"),
        ({"dtype": "fp32", "max": 1e-4, "mean": 2e-5}, "mean 2e-05 is not within 1e-05"),
        ({"dtype": "fp32", "max": 4e-4, "mean": 1e-6}, "max 0.0004 is not within 0.0003"),
        ({"dtype": "bf16", "mean": 1e-3, "k3": 2e-4}, "k3 0.0002 is not within 0.0001"),
        ({"dtype": "bf16", "mean": NAN, "k3": 1e-5}, "mean nan is not within 0.01"),
        ({"tokens": QUICK.tokens - 1}, "299 sampled tokens are fewer than 300"),
        ({"evicted": 0}, "0 tokens evicted"),
        ({"video_evicted": 0.29}, "share of video tokens evicted 0.29 is below 0.3"),
        ({"video_evicted": None}, "share of video tokens evicted None"),
        ({"defects": GOOD.defects | {"late_end": DEFECT_BAR}}, "the planted defect late_end shows as 1e-07"),
        ({"defects": GOOD.defects | {"causal_mask": NAN}}, "the planted defect causal_mask shows as nan"),
        ({"defects": GOOD.defects | {"causal_mask": None}}, "the defect causal_mask was not planted"),
        ({"defects": {}}, "the defect no_ban_list was not planted"),
    ],
)
def test_what_misses_a_bar_is_named(change, words):
    assert GOOD.misses(QUICK, evicts=True) == []
    wrong = dataclasses.replace(GOOD, **change)
    assert any(words in line for line in wrong.misses(QUICK, evicts=True)), wrong.misses(QUICK, evicts=True)
    (line, *_) = consistency.missed([wrong], QUICK)
    assert line.startswith(f"rcsm qwen2_5_vl native {wrong.dtype}: ")


def test_full_must_not_evict_and_the_full_size_needs_its_tokens():
    whole = dataclasses.replace(GOOD, policy="full")
    assert consistency.missed([whole], QUICK) == ["full qwen2_5_vl native fp64: 7 tokens evicted"]
    assert "300 sampled tokens are fewer than 10000" in GOOD.misses(FULL, evicts=True)
    assert consistency.missed([], QUICK) == ["nothing was measured"]


def test_an_empty_sample_is_null_and_json_knows_no_nan():
    empty = figures([], np.zeros(0))
    assert empty["tokens"] == 0
    assert {empty[key] for key in ("mean", "p99", "max", "k3", "video_evicted")} == {None}
    assert consistency.strict({"a": [NAN, float("inf"), 0.0], "b": None}) == {"a": [None, None, 0.0], "b": None}


def test_an_engine_that_samples_nothing_misses_its_bars_by_name(monkeypatch):
    monkeypatch.setattr(rows, "signed_differences", lambda *_: np.zeros(0))
    status, report, text = command("--quick", "--policies", "rcsm", "--backbones", "qwen2_5_vl")
    assert status == 1
    assert {row["max"] for row in report["rows"]} == {None}
    assert "MISSED rcsm qwen2_5_vl native fp64: 0 sampled tokens are fewer than 300" in text
    assert "MISSED rcsm qwen2_5_vl native fp64: the defect causal_mask was not planted" in text


@pytest.mark.parametrize("given", ["native", "contiguous"])
def test_a_row_has_the_positions_that_it_is_named_after(given, tmp_path):
    memories = {p.positions: p.memory for p in POLICIES if p.name == "sink_window"}
    backbone = loud_backbone(tmp_path, torch.float32)
    logs = run(backbone, random_requests(backbone, memories[given], 1, low=6))
    check_positions(logs, given)
    (other,) = memories.keys() - {given}
    with pytest.raises(ValueError, match=f"moved (no|some) token in a row of {other} positions"):
        check_positions(logs, other)


@dataclasses.dataclass
class Log:
    """As much of a log as is counted."""

    ids: np.ndarray
    behaviour_logp: np.ndarray
    sampled: np.ndarray


def test_nothing_is_counted_twice():
    one = Log(np.arange(3), np.array([NAN, -1.0, -2.0]), np.array([False, True, True]))
    other = dataclasses.replace(one, ids=np.arange(1, 4))
    check_counted_once([one, other], np.zeros(4))
    with pytest.raises(ValueError, match="3 differences for 4 sampled tokens"):
        check_counted_once([one, other], np.zeros(3))
    with pytest.raises(ValueError, match="2 streams, of which only 1 differ"):
        check_counted_once([one, one], np.zeros(4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policies", "rscm"], "--policies 'rscm' is not one of full, rcsm"),
        (["--backbones", "llama"], "--backbones 'llama' is not one of qwen2_5_vl, qwen3_vl"),
    ],
)
def test_a_name_that_there_is_not_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        consistency.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err

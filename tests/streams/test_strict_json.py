"""JSON that every reader takes, whatever numbers a run has come to."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.store.checkpoint import CheckpointState, commit, partial_path, read_state
from runtime.store.journal import StepJournal, read_lines
from streams.support.files import write_json
from streams.support.strict_json import dumps, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def strict(text: str):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def same(first, second) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@given(VALUES)
def test_what_is_written_is_json_and_what_is_kept_comes_back(value):
    strict(dumps(value))
    strict(dumps(value, keep=True))
    assert same(loads(dumps(value, keep=True)), value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_files_of_a_run_hold_null_for_a_number_that_is_none(tmp_path, number):
    write_json(tmp_path / "summary.json", {"reward": number, "by": {"now": [1.0, number]}})
    assert strict((tmp_path / "summary.json").read_text()) == {"reward": None, "by": {"now": [1.0, None]}}
    journal = StepJournal.open(tmp_path / "sft.steps.jsonl", 0)
    journal.append(1, {"loss": number, "entropy": 0.5})
    assert strict(journal.path.read_text())["values"] == {"loss": None, "entropy": 0.5}
    assert read_lines(journal.path)[0].values == {"loss": None, "entropy": 0.5}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_checkpoints_counters_come_back_as_they_were(tmp_path, number):
    state = CheckpointState("sft", 1, 1, counters={"last_loss": number, "seconds": 1.5})
    partial = partial_path(tmp_path / "step000001")
    commit(partial, tmp_path / "step000001", state)
    strict((tmp_path / "step000001" / "state.json").read_text())
    assert same(read_state(tmp_path / "step000001").counters, state.counters)

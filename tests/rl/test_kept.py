"""Groups in a checkpoint's files: what is read is what was written, for every memory; without Ray."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.compose import AnswerResult, RewardResult
from rl.groups import kept
from streams.log.mismatch import LogpDiff, OffToken
from streams.memory import MemoryConfig, make_policy
from streams.messages import GroupPayload, GroupSummary
from streams.positions.mrope import PositionCursor
from streams.turns import ParsedTurn
from streams.writing.writer import StreamWriter
from tests.support.logs import assert_same_log
from tests.support.policies import LAYOUTS, MEMORIES, generate, header, plans

CONTIGUOUS = MemoryConfig("sink_window", 2, 3, sink_tokens=4, tail_tokens=5, positions="contiguous")
SUMMARY = GroupSummary(
    "1/a",
    "a",
    3,
    turns=((ParsedTurn(0, "hm", None, True, 3, 5), ParsedTurn(1, "", "red \u2603", False)), ()),
    targets=((4, 0), ()),
    oldest_version=2,
    versions=(2, 3),
    monitor=LogpDiff(4, 1e-7, 2e-7, 0.0),
    off=OffToken("1/a/0", "rcsm", "think", 0, 7, 99, 2, -1.5, float("nan"), True),
)
RESULTS = (
    RewardResult(0.5, {"timing": 0.25}, (AnswerResult(0, "now", 2, 1, True, 0.75, 0.5, {"timing": 0.25}),)),
    RewardResult(0.0, {}, (), failed="stream 1/a/1: no"),
)


def written(plan, memory, seed):
    layout = LAYOUTS[0]
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    rng = np.random.default_rng(seed)
    for shown in plan:
        writer.begin_turn(shown, version=0)
        generate(writer, layout, rng)
    return writer.finish()


def stored(path, payload):
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.store(path, SUMMARY, RESULTS, payload)


@given(st.one_of(*MEMORIES.values(), st.just(CONTIGUOUS)), st.data())
@settings(max_examples=40, deadline=None)
def test_a_group_is_read_as_it_was_written(tmp_path_factory, memory, data):
    logs = tuple(written(data.draw(plans()), memory, seed) for seed in range(data.draw(st.integers(1, 3))))
    kind = data.draw(st.sampled_from([np.uint8, np.float32, np.int16]))
    media = np.arange(24).astype(kind).reshape(2, 3, 4)
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    stored(checkpoint / kept.FOLDER / "00000", GroupPayload(logs, "features", media))
    (found,) = kept.read(checkpoint).values()
    assert repr(found.summary) == repr(SUMMARY)
    assert found.results == RESULTS
    got = kept.load(found.path)
    assert (got.media_kind, got.media.dtype) == ("features", kind)
    np.testing.assert_array_equal(got.media, media)
    for mine, other in zip(got.logs, logs, strict=True):
        assert_same_log(mine, other)


def test_a_checkpoint_without_groups_and_one_of_other_code_have_none(tmp_path, caplog):
    assert kept.read(tmp_path) == {}
    path = tmp_path / kept.FOLDER / "00000"
    stored(path, GroupPayload((), "features", np.zeros(1)))
    assert list(kept.read(tmp_path)) == ["1/a"]
    text = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(text | {"version": text["version"] - 1}))
    assert kept.read(tmp_path) == {}
    assert "was written by other code: its groups are rolled out again" in caplog.text


def test_damaged_files_are_a_value_error_and_never_pickle(tmp_path):
    path = tmp_path / kept.FOLDER / "00000"
    stored(path, GroupPayload((), "features", np.zeros(1)))
    np.savez(path.with_suffix(".npz"), media=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        kept.load(path)
    path.with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises((ValueError, OSError)):
        kept.load(path)

"""Groups in a checkpoint's files: what is read is what was written, for every memory; without Ray."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.compose import AnswerResult, RewardResult
from rl.groups import kept
from rl.groups.dispatch import KEPT
from rl.loop import RLLoop
from runtime.store.checkpoint import CheckpointState
from streams.log.mismatch import LogpDiff, OffToken
from streams.memory import MemoryConfig, make_policy
from streams.messages import MESSAGES_VERSION, GroupPayload, GroupSummary
from streams.positions.mrope import PositionCursor
from streams.turns import ParsedTurn
from streams.writing.writer import StreamWriter, TurnInput
from tests.support.configs import composed
from tests.support.logs import assert_same_log, file_size_limit
from tests.support.policies import LAYOUTS, MEMORIES, generate, header, plans
from tests.support.stage import stage_context
from tests.support.tasks import clip_task

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


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", "{", '{"version": 0}', "[" * 200_000),
        json.dumps({"version": MESSAGES_VERSION}),
        json.dumps({"version": MESSAGES_VERSION, "summary": {}, "results": []}),
        json.dumps({"version": MESSAGES_VERSION, "summary": None, "results": 1}),
        b"\xff\xfe",
    ],
)
def test_a_group_that_is_damaged_is_named_and_rolled_out_again(tmp_path, caplog, text):
    good, bad = (tmp_path / kept.FOLDER / name for name in ("00000", "00001"))
    for path in (good, bad):
        stored(path, GroupPayload((), "features", np.zeros(1)))
    bad.with_suffix(".json").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = kept.read(tmp_path)
    if "other code" not in caplog.text:
        assert [group.path for group in found.values()] == [good]
        assert f"{bad}.json is damaged" in caplog.text
    assert "rolled out again" in caplog.text


@pytest.mark.parametrize("how", ["no zip", "empty", "cut", "a column short", "no logs"])
def test_arrays_that_are_damaged_cost_the_group(tmp_path, how):
    path = tmp_path / kept.FOLDER / "00000"
    stored(path, GroupPayload((written([TurnInput(None)] * 2, MemoryConfig("full"), 0),), "features", np.zeros(9)))
    file, text = path.with_suffix(".npz"), path.with_suffix(".json")
    if how == "no zip":
        file.write_bytes(b"PK no zip")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif how == "a column short":
        with np.load(file) as arrays:
            np.savez(file, **(dict(arrays) | {"0.kind": arrays["0.kind"][1:]}))
    else:
        text.write_text("{}")
    why, payload = kept._fetch._function(str(path))
    assert payload is None
    assert f"{path} is damaged" in why


def groups(count):
    return [(replace(SUMMARY, group=f"{n}/a"), RESULTS) for n in range(count)]


@pytest.fixture
def payloads(monkeypatch):
    """`ray.get` returns what it is given; a payload that is an error was lost."""

    def get(reference, timeout):
        if isinstance(reference, Exception):
            raise reference
        return reference

    monkeypatch.setattr(kept.ray, "get", get)
    return [GroupPayload((), "features", np.zeros(1)) for _ in range(3)]


def test_what_was_lost_with_its_worker_is_not_kept(tmp_path, payloads):
    payloads[1] = ray.exceptions.ObjectLostError("0" * 56, None, "")
    assert kept._write._function(groups(3), payloads, str(tmp_path / kept.FOLDER), 60.0) == ["0/a", "2/a"]
    assert list(kept.read(tmp_path)) == ["0/a", "2/a"]


def test_a_full_disk_or_no_time_costs_the_groups_and_not_the_checkpoint(tmp_path, payloads, caplog):
    folder = tmp_path / kept.FOLDER
    payloads[1] = replace(payloads[1], media=np.zeros(10_000))
    with file_size_limit(20_000):
        assert kept._write._function(groups(3), payloads, str(folder), 60.0) == []
    assert "finished rollouts are not kept" in caplog.text
    assert not folder.exists(), "the checkpoint needs the room"
    assert kept._write._function(groups(3), payloads, str(folder), 0.0) == []


def test_a_kept_group_that_would_be_too_old_is_rolled_out_again(tmp_path):
    for n, oldest in enumerate((4, 9)):
        path = tmp_path / kept.FOLDER / f"{n}"
        path.parent.mkdir(exist_ok=True)
        summary = replace(SUMMARY, group=f"{n}/a", oldest_version=oldest)
        kept.store(path, summary, RESULTS, GroupPayload((), "features", np.zeros(1)))
    config = composed(f"run_root={tmp_path}", "algorithm.groups_in_flight=2", "algorithm.groups_per_step=1")
    state = CheckpointState("rl", version=9, step=9, rows=("a",), seed=config.seed)
    context, _ = stage_context(config, "rl", steps=50, resume=state)
    loop = RLLoop(replace(context, resumed=tmp_path), (clip_task("a"),))
    assert loop.buffer.limits.bound < 9 - 4
    fetched = []
    loop.stage.events.expect = lambda *given: fetched.append(given[1])
    first, second = (loop.dispatch.next(9, 1000) for _ in range(2))
    assert (first.life, second.life) == (KEPT, KEPT)
    loop._take(first)
    loop._take(second)
    assert fetched == ["group 1/a of the checkpoint"]
    again = loop.dispatch.next(9, 1000)
    assert (again.group, again.ticket) == ("0/a", first.ticket)
    assert again.life != KEPT

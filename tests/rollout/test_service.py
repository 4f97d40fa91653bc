"""The rollout service in this process, without Ray: real clips, a tiny model, real threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.groups import REPLACED
from streams.backbone.boundary import Boundary
from streams.memory import MemoryConfig
from streams.messages import ScriptedTurn, ScriptTask
from streams.scoring.logprobs import behaviour_differences
from streams.task import Plan
from tests.support.service import TURNS, WAIT_S, group, open_service, roll, update_of, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(setup):
    """For tests that leave the weights as they are."""
    service = open_service(setup, worker=7)
    yield service
    service.close()


@pytest.fixture
def fresh(setup):
    service = open_service(setup, worker=7)
    yield service
    service.close()


def test_room_for_unrotated_keys_is_taken_before_any_group(setup, shared):
    assert shared.engine.pool.raw is None
    memory = MemoryConfig("sink_window", 3, text_window=3, positions="contiguous")
    service = open_service(replace(setup, memory=memory))
    try:
        assert service.engine.pool.raw is not None
    finally:
        service.close()


def test_the_keys_of_decoding_reach_the_engine(setup, shared):
    assert shared.engine.decode_attention.name == "torch"
    assert shared.engine.graphs.why == "no CUDA, the device is cpu"
    given = replace(setup.rollout, cuda_graphs="off", attention="torch")
    service = open_service(replace(setup, rollout=given))
    service.close()
    assert str(service.engine.decode_attention) == "torch (rollout.attention=torch)"
    assert service.engine.graphs.why == "rollout.cuda_graphs=off"
    with pytest.raises(ValueError, match=r"rollout\.attention=triton cannot run here: no CUDA, the device is cpu"):
        open_service(replace(setup, rollout=replace(setup.rollout, attention="triton")))


def assert_same(first, second):
    for a, b in zip(first.logs, second.logs, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.expiry, b.expiry)
        np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-5)


def assert_idle(service):
    """All slots are free and nothing waits for them."""
    assert not service.engine.busy
    assert service.engine.pool.available == service.engine.pool.capacity


# ---- groups ----


def test_a_group_comes_back_as_one_parsed_log_per_stream(shared, tasks):
    summary, payload = roll(shared, group(tasks[0], "0/a", streams=3))
    assert summary.failed is None
    assert (summary.group, summary.task_id, summary.worker) == ("0/a", tasks[0].id, 7)
    assert [log.header.stream_id for log in payload.logs] == ["0/a/0", "0/a/1", "0/a/2"]
    assert [[turn.turn for turn in turns] for turns in summary.turns] == [list(range(TURNS))] * 3
    assert summary.turns == tuple(shared.backbone.layout.parse_turns(log) for log in payload.logs)
    assert summary.tokens == sum(int(log.sampled.sum()) for log in payload.logs) > 0
    assert summary.log_tokens == sum(len(log) for log in payload.logs)
    assert summary.evicted_tokens > 0
    assert summary.versions == (0,)
    assert len({log.ids.tobytes() for log in payload.logs}) == 3, "streams of a group are sampled apart"
    assert payload.media_kind == "features"
    assert payload.media.shape[0] == TURNS
    assert_idle(shared)


def test_a_group_that_is_asked_for_again_while_it_runs_is_run_once_for_who_asked_last(shared, tasks, monkeypatch):
    """As when the memory of another worker was lost, which it had been given: its name must not run twice."""
    _, alone = roll(shared, group(tasks[0], "0/again"))
    step, go_on = shared.engine.step, threading.Event()
    monkeypatch.setattr(shared.engine, "step", lambda: step() if go_on.is_set() else [])
    first = shared.submit(group(tasks[0], "0/again"))
    wait_until(lambda: "0/again" in shared._groups._running, "the first never ran")
    second = shared.submit(group(tasks[0], "0/again"))
    summary, payload = first.result(timeout=WAIT_S)
    assert (summary.failed, payload) == (f"RuntimeError: {REPLACED}", None)
    go_on.set()
    summary, payload = second.result(timeout=WAIT_S)
    assert summary.failed is None
    assert_same(payload, alone)
    assert_idle(shared)


def test_the_monitor_re_scores_streams_and_finds_no_difference(shared, tasks):
    summary, payload = roll(shared, group(tasks[0], "0/monitored"))
    assert summary.monitor.tokens == summary.tokens
    assert summary.monitor.max < 1e-4
    # The same by hand, from what is shipped.
    features = torch.from_numpy(payload.media).flatten(0, 1)
    found = behaviour_differences(shared.backbone, list(payload.logs), [features] * len(payload.logs))
    assert max(np.abs(d).max() for d in found) == pytest.approx(summary.monitor.max, abs=1e-5)


def test_a_missing_video_fails_its_group_and_the_service_lives_on(shared, tasks):
    gone = replace(tasks[0], id="gone", video=tasks[0].video + ".gone")
    summary, payload = roll(shared, group(gone, "0/gone"))
    assert payload is None
    assert summary.failed.startswith(f"VideoError: {gone.video}: ")
    assert "No such file" in summary.failed
    assert summary.clip_seconds == gone.end - gone.start
    summary, payload = roll(shared, group(tasks[0], "0/after"))
    assert summary.failed is None
    assert len(payload.logs) == 3


def test_a_failure_inside_a_step_fails_what_runs_returns_all_slots_and_the_service_lives_on(fresh, tasks):
    wide = np.zeros((TURNS, 4, 9), np.float32)
    summary, payload = roll(fresh, group(tasks[0], "0/wide", features=wide))
    assert payload is None
    assert summary.failed.startswith("ValueError: features of width 9, but qwen2_5_vl takes 64")
    assert_idle(fresh)
    summary, payload = roll(fresh, group(tasks[0], "0/after"))
    assert summary.failed is None
    assert_idle(fresh)


def test_a_group_that_can_never_fit_is_refused_by_name_and_leaves_nothing_behind(setup, tasks):
    small = open_service(replace(setup, kv_slots=2048, layout=replace(setup.layout, system_prompt="Watch. " * 2500)))
    try:
        summary, payload = roll(small, group(tasks[0], "0/large"))
        assert payload is None
        assert "stream 0/large/0 may need " in summary.failed
        assert "raise rollout.kv_memory_mb" in summary.failed
        assert_idle(small)
    finally:
        small.close()


def test_a_group_past_its_deadline_fails_by_the_name_of_the_setting_and_its_slots_come_back(setup, tasks):
    service = open_service(replace(setup, rollout=replace(setup.rollout, group_deadline_s=0.05)))
    try:
        # The first group is late because its clip is not read in time, the second, whose clip is cached, while it runs.
        for name in ("0/reading", "0/running"):
            summary, payload = roll(service, group(tasks[0], name, streams=16, turns=10))
            assert payload is None
            assert summary.failed == ("TimeoutError: the group was not finished within rollout.group_deadline_s=0.05")
            assert summary.seconds >= 0.05
            assert_idle(service)
        assert service.engine.steps > 0
        demonstration = ScriptTask("0/script", tasks[0], Plan(1, 1.0), (ScriptedTurn("nothing", None),))
        assert service.script(demonstration).result(timeout=WAIT_S)[0].failed is None
    finally:
        service.close()


# ---- what decides a log ----


def test_a_greedy_group_is_repeatable(shared, tasks):
    first = roll(shared, group(tasks[1], "eval/a", streams=1, temperature=0.0))[1]
    second = roll(shared, group(tasks[1], "eval/b", streams=1, temperature=0.0))[1]
    assert_same(first, second)
    assert not first.logs[0].header.trainable


def test_a_sampled_group_does_not_depend_on_what_else_runs(shared, tasks):
    alone = roll(shared, group(tasks[1], "4/a"))[1]
    others = [shared.submit(group(tasks[i], f"4/other{i}", streams=6, turns=10)) for i in (0, 2)]
    steps = shared.engine.steps
    wait_until(lambda: shared.engine.steps > steps + 5, "the other groups never ran")
    among = roll(shared, group(tasks[1], "4/a"))[1]
    assert not all(other.done() for other in others), "nothing else was running"
    assert_same(alone, among)
    assert all(other.result(timeout=WAIT_S)[0].failed is None for other in others)
    other_name = roll(shared, group(tasks[1], "5/a"))[1]
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(alone.logs, other_name.logs, strict=True))


def test_the_run_seed_decides_what_is_sampled(setup, shared, tasks):
    one = roll(shared, group(tasks[1], "6/a"))[1]
    for seed, same in ((5, True), (6, False)):
        service = open_service(replace(setup, run_seed=seed))
        try:
            two = roll(service, group(tasks[1], "6/a"))[1]
        finally:
            service.close()
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one.logs, two.logs, strict=True)) == same


def test_memory_and_thoughts_of_a_task_override_the_workers_own(shared, tasks):
    memory = MemoryConfig("recent_frames", 2)
    summary, payload = roll(shared, group(tasks[0], "eval/c", memory=memory, empty_thoughts=True))
    header = payload.logs[0].header
    assert (header.policy, header.policy_knobs) == ("recent_frames", (("window", 2),))
    assert all(turn.thought == "" and turn.think_tokens == 2 for turns in summary.turns for turn in turns)


# ---- features ----


def test_a_clip_is_encoded_once_whatever_groups_show_it(fresh, tasks):
    together = [fresh.submit(group(tasks[0], f"{i}/a")) for i in range(2)]
    payloads = [future.result(timeout=WAIT_S)[1] for future in together]
    assert fresh.stats().clips_encoded == 1
    assert payloads[0].media is payloads[1].media
    roll(fresh, group(tasks[0], "2/a"))
    assert fresh.stats().clips_encoded == 1
    roll(fresh, group(tasks[1], "2/b"))
    assert fresh.stats().clips_encoded == 2


def test_features_that_come_with_a_task_are_used_and_not_encoded_again(setup, shared, fresh, tasks):
    made = roll(shared, group(tasks[2], "7/a"))[1]
    given = roll(fresh, group(tasks[2], "7/a", features=made.media))[1]
    assert fresh.stats().clips_encoded == 0
    assert_same(made, given)
    # They are what the streams see: other features, other log-probs.
    other = roll(fresh, group(tasks[2], "7/a", features=made.media + 1))[1]
    assert not np.array_equal(other.logs[0].ids, made.logs[0].ids)


def test_a_training_tower_ships_frames_and_its_new_weights_encode_the_clip_again(setup, tasks):
    service = open_service(replace(setup, boundary=Boundary.NONE))
    try:
        payload = roll(service, group(tasks[0], "0/a"))[1]
        assert payload.media_kind == "frames"
        assert payload.media.dtype == np.uint8
        roll(service, group(tasks[0], "1/a"))
        assert service.stats().clips_encoded == 1
        service.stage(update_of(service.backbone, 1, freeze="none"), 0.0).result(timeout=WAIT_S)
        roll(service, group(tasks[0], "2/a"))
        assert service.stats().clips_encoded == 2
    finally:
        service.close()


@pytest.mark.parametrize(
    "freeze",
    [
        "none",
        "tower",
        "tower+merger",
    ],
)
def test_a_bfloat16_model_rolls_out(setup, tasks, freeze):
    service = open_service(replace(setup, dtype="bfloat16", boundary=Boundary(freeze)))
    try:
        summary, _ = roll(service, group(tasks[0], "0/a"))
    finally:
        service.close()
    assert summary.failed is None, summary.failed


# ---- weights ----


def holds(backbone, update):
    parameters = dict(backbone.model.named_parameters())
    ours = np.concatenate([parameters[name].detach().contiguous().view(-1).numpy() for name in update.names])
    return np.array_equal(ours, update.buffer.view(np.float32))


def test_weights_are_swapped_between_steps_while_streams_run(setup, fresh, shared, tasks):
    running = fresh.submit(group(tasks[0], "0/a", streams=12, turns=10))
    wait_until(lambda: fresh.engine.steps > 12, "the group never ran")
    update = update_of(fresh.backbone, 1, change=0.1)
    report = fresh.stage(update, 0.25).result(timeout=WAIT_S)
    assert not running.done()
    assert (report.worker, report.version, report.fetch_s) == (7, 1, 0.25)
    assert 0 < report.pause_s < WAIT_S
    assert 0 < report.busy_share <= 1
    assert holds(fresh.backbone, update)
    summary, payload = running.result(timeout=WAIT_S)
    assert (summary.oldest_version, summary.versions) == (0, (0, 1))
    assert summary.monitor.tokens == 0, "a stream that lived through a swap cannot be re-scored"
    features = torch.from_numpy(payload.media).flatten(0, 1)
    # `shared` still holds version 0: it agrees with what was sampled before the swap, and only with that.
    found = behaviour_differences(shared.backbone, list(payload.logs), [features] * len(payload.logs))
    before, after = [], []
    for log, difference in zip(payload.logs, found, strict=True):
        assert (np.diff(log.version) >= 0).all()
        assert log.single_version is None
        version = log.version[log.sampled]
        before.append(np.abs(difference[version == 0]))
        after.append(np.abs(difference[version == 1]))
    assert np.concatenate(before).max() < 1e-4
    assert np.median(np.concatenate(after)) > 1e-2
    summary = roll(fresh, group(tasks[0], "1/a"))[0]
    assert summary.versions == (1,)
    assert summary.monitor.max < 1e-4


@pytest.mark.parametrize("late", [2, 3])
def test_a_version_that_is_not_newer_is_never_applied(fresh, late):
    newest, old = update_of(fresh.backbone, 3, change=0.1), update_of(fresh.backbone, late, change=0.2)
    assert fresh.stage(newest, 0.0).result(timeout=WAIT_S).version == 3
    assert fresh.stage(old, 0.0).result(timeout=WAIT_S).version == 3
    assert holds(fresh.backbone, newest)
    assert not holds(fresh.backbone, old)


def spoiled(update, how):
    if how == "name":
        return replace(update, names=("model.no_such.weight", *update.names[1:]))
    if how == "shape":
        return replace(update, shapes=((1, *update.shapes[0]), *update.shapes[1:]))
    if how == "missing":
        return replace(update, names=update.names[:-1], shapes=update.shapes[:-1])
    return replace(update, buffer=update.buffer[:-400])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("name", r"model\.no_such\.weight .* does not fit this backbone"),
        ("shape", r"\(1, 640, 64\) does not fit this backbone"),
        ("missing", "bytes for shapes that take"),
        ("short", "weights of version 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(shared, how, reason):
    before = update_of(shared.backbone, 1)
    with pytest.raises(ValueError, match=reason):
        shared.stage(spoiled(before, how), 0.0)
    assert holds(shared.backbone, before)
    assert shared.engine.version == 0


# ---- demonstrations ----


def test_a_demonstration_is_laid_out_with_its_frames(shared, tasks):
    script = (ScriptedTurn("nothing", None), ScriptedTurn("red", "red"), ScriptedTurn("", None))
    summary, payload = shared.script(ScriptTask("0/demo", tasks[0], Plan(len(script), 1.0), script)).result(
        timeout=WAIT_S
    )
    assert summary.failed is None
    (log,) = payload.logs
    assert log.num_turns == 3
    assert [(turn.thought, turn.response) for turn in summary.turns[0]] == [
        ("nothing", None),
        ("red", "red"),
        ("", None),
    ]
    assert all(turn.well_formed for turn in summary.turns[0])
    assert log.target.any()
    assert not log.sampled.any()
    assert (payload.media_kind, payload.media.shape[:2], payload.media.dtype) == ("frames", (3, 2), np.uint8)


@pytest.mark.parametrize(
    ("scripted", "key"),
    [
        (ScriptedTurn("a red square, a green circle, a blue triangle", "red"), "layout.think_budget=4"),
        (ScriptedTurn("red", "a red square, a green circle, a blue triangle"), "layout.max_new_tokens=7"),
    ],
)
def test_a_demonstration_longer_than_its_budgets_is_refused_by_name(shared, tasks, scripted, key):
    script = (ScriptedTurn("nothing", None), scripted)
    summary, payload = shared.script(ScriptTask("0/long", tasks[0], Plan(len(script), 1.0), script)).result(
        timeout=WAIT_S
    )
    assert payload is None
    assert "of turn 1 has " in summary.failed
    assert key in summary.failed


def test_a_demonstration_of_a_missing_video_fails_alone(shared, tasks):
    gone = replace(tasks[0], id="gone", video=tasks[0].video + ".gone")
    summary, payload = shared.script(ScriptTask("0/gone", gone, Plan(1, 1.0), (ScriptedTurn("", None),))).result(
        timeout=WAIT_S
    )
    assert payload is None
    assert "No such file" in summary.failed
    assert summary.task_id == "gone"

"""Where a service encodes, ahead of its engine or between its steps: real threads, a tiny model, real clips."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import rollout.service
from rollout.promises import ServiceClosedError
from rollout.threads import EncodedClips
from streams.backbone import slices
from streams.backbone.backbone import to_array
from streams.backbone.boundary import Boundary
from streams.backbone.slices import encodes_ahead
from tests.support.service import TURNS, WAIT_S, group, open_service, roll, update_of, wait_until

pytestmark = pytest.mark.slow
FROZEN = [Boundary.TOWER, Boundary.TOWER_MERGER]
AHEAD = pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "between steps"])
PATCHES = 16
"""Of a chunk of the first task's clip: a slice is one chunk of it."""


@pytest.fixture
def open_it(setup, monkeypatch):
    """Open services that encode ahead or not, whatever the device, one chunk a slice, one slice a visit."""
    monkeypatch.setattr(slices, "CPU_SLICE_PATCHES", PATCHES)
    monkeypatch.setattr(slices, "VISIT_PATCHES", PATCHES)
    opened = []

    def open_one(ahead, **given):
        with monkeypatch.context() as patch:
            patch.setattr(rollout.service, "encodes_ahead", lambda boundary, device: ahead)
            opened.append(open_service(replace(setup, **given)))
        return opened[-1]

    yield open_one
    for service in opened:
        service.close()


class TowerGate:
    """Stops a service's tower inside a call of it, and notes every call: by which thread, and after how many engine steps."""

    def __init__(self, service, *, stop_at=None, error=None):
        self.calls = []
        self.inside, self.go_on = threading.Event(), threading.Event()
        self._service, self._stop_at, self._error = service, stop_at, error
        service.backbone.model.model.visual.blocks[0].register_forward_hook(self._called)

    def _called(self, *_):
        self.calls.append((threading.current_thread().name, self._service.engine.steps))
        if len(self.calls) == self._stop_at:
            self.inside.set()
            assert self.go_on.wait(WAIT_S)
            if self._error is not None:
                raise self._error


class EngineGate:
    """Stops the engine thread before its next step."""

    def __init__(self, service, monkeypatch):
        self.inside, self.go_on = threading.Event(), threading.Event()
        step = service.engine.step

        def stopped():
            self.inside.set()
            assert self.go_on.wait(WAIT_S)
            return step()

        monkeypatch.setattr(service.engine, "step", stopped)


def clips_of(service):
    return service._features._clips


def assert_nothing_waits(service):
    clips = clips_of(service)
    assert clips._waiting == 0
    assert clips.used == sum(place.nbytes for place in clips._places.values())
    assert not service.engine.busy


def test_only_frozen_weights_on_a_gpu_encode_ahead():
    assert [encodes_ahead(boundary, "cuda") for boundary in Boundary] == [False, True, True]
    assert not any(encodes_ahead(boundary, "cpu") for boundary in Boundary)


@pytest.mark.parametrize("boundary", FROZEN)
def test_a_clip_encoded_ahead_is_shipped_as_it_is_embedded_and_makes_the_same_logs(open_it, tasks, boundary):
    found = []
    for ahead in (True, False):
        service = open_it(ahead, boundary=boundary)
        gate = TowerGate(service)
        summary, payload = roll(service, group(tasks[0], "0/a"))
        assert summary.failed is None
        assert [name for name, _ in gate.calls] == ["encode" if ahead else "engine"] * TURNS
        assert service.stats().clips_encoded == 1
        assert summary.monitor.max < 1e-4
        assert service.meter.usage()["encode"].calls == TURNS
        found.append(payload)
        assert_nothing_waits(service)
    assert np.array_equal(found[0].media, found[1].media)
    for a, b in zip(found[0].logs, found[1].logs, strict=True):
        assert np.array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-5)


def test_streams_run_and_end_while_the_tower_encodes_ahead(open_it, tasks):
    service = open_it(True)
    gate = TowerGate(service, stop_at=TURNS + 2)
    running = service.submit(group(tasks[0], "0/runs"))
    slow = service.submit(group(tasks[1], "0/slow"))
    assert gate.inside.wait(WAIT_S)
    swap = service.stage(update_of(service.backbone, 1, change=0.1), 0.0)
    assert swap.result(timeout=WAIT_S).version == 1, "a swap of what trains waits for no clip"
    assert running.result(timeout=WAIT_S)[0].failed is None
    assert not slow.done()
    gate.go_on.set()
    assert slow.result(timeout=WAIT_S)[0].failed is None


def test_a_stream_steps_between_the_slices_of_a_clip_on_its_own_thread(open_it, tasks):
    service = open_it(False)
    running = service.submit(group(tasks[0], "0/long", turns=10))
    wait_until(lambda: service.engine.steps > 12, "the group never ran")
    gate = TowerGate(service)
    assert roll(service, group(tasks[1], "0/other"))[0].failed is None
    running.result(timeout=WAIT_S)
    steps = [steps for _, steps in gate.calls]
    assert len(steps) > 2
    assert len(set(steps)) == len(steps), "running streams waited for more than a slice"


@AHEAD
def test_a_clip_that_cannot_be_encoded_fails_its_group_alone(open_it, tasks, ahead):
    service = open_it(ahead)
    gate = TowerGate(service, stop_at=3, error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    gate.go_on.set()
    failing, after = (service.submit(group(task, f"0/{i}")) for i, task in enumerate(tasks[:2]))
    summary, payload = failing.result(timeout=WAIT_S)
    assert payload is None
    assert summary.failed == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert after.result(timeout=WAIT_S)[0].failed is None
    assert service.stats().clips_encoded == 1
    assert_nothing_waits(service)
    assert roll(service, group(tasks[0], "1/0"))[0].failed is None


# ---- weights that encode are replaced ----


def whole_vision(service, version):
    """An update that replaces every weight, the tower's as well: no learner with this boundary sends it."""
    return update_of(service.backbone, version, change=0.1, freeze="none")


def distances(service, payload, frames):
    """How far what was shipped is from what the weights of today make of the clip, chunk by chunk."""
    made = to_array(service.backbone.encoding(frames, pre_merger=payload.media_kind == "pre_merger").finish())
    return np.abs(payload.media - made).max((1, 2))


def swapped_while_a_clip_is_half_encoded(service, task):
    """(payload, frames) of a group during whose third slice a swap came."""
    gate = TowerGate(service, stop_at=3)
    future = service.submit(group(task, "0/a"))
    assert gate.inside.wait(WAIT_S)
    swap = service.stage(whole_vision(service, 1), 0.0)
    if service._features.ahead:
        wait_until(lambda: service._features._weights._replacing, "the engine thread never came so far")
    assert not swap.done(), "weights were replaced inside a call of the tower"
    gate.go_on.set()
    assert swap.result(timeout=WAIT_S).version == 1
    summary, payload = future.result(timeout=WAIT_S)
    assert summary.failed is None
    assert len(gate.calls) == 3 + TURNS, "it began anew"
    return payload


@pytest.mark.parametrize("boundary", FROZEN)
@AHEAD
def test_a_clip_that_is_half_encoded_when_its_weights_change_is_encoded_anew(open_it, tasks, ahead, boundary):
    service = open_it(ahead, boundary=boundary)
    payload = swapped_while_a_clip_is_half_encoded(service, tasks[0])
    frames = service._frames.read(tasks[0], group(tasks[0], "").plan).frames
    assert distances(service, payload, frames).max() < 1e-6
    assert service.stats().clips_encoded == 1
    assert {log.single_version for log in payload.logs} == {1}
    assert_nothing_waits(service)


@AHEAD
def test_without_the_generation_of_weights_a_clip_would_be_of_two_versions(open_it, tasks, ahead, monkeypatch):
    """The planted defect that the test above sees."""
    monkeypatch.setattr(EncodedClips, "outdate", lambda clips: None)
    service = open_it(ahead)
    with pytest.raises(AssertionError, match="it began anew"):
        swapped_while_a_clip_is_half_encoded(service, tasks[0])
    payload = roll(service, group(tasks[0], "1/a"))[1]
    frames = service._frames.read(tasks[0], group(tasks[0], "").plan).frames
    off = distances(service, payload, frames)
    assert off[:3].min() > 1e-2
    assert off[3:].max() < 1e-6, "the later chunks are by the new weights"


def test_a_group_that_waits_for_the_engine_is_encoded_anew_when_the_weights_change(open_it, tasks, monkeypatch):
    service = open_it(True)
    gate = EngineGate(service, monkeypatch)
    first = service.submit(group(tasks[0], "0/runs"))
    assert gate.inside.wait(WAIT_S)
    second = service.submit(group(tasks[1], "0/waits"))
    wait_until(lambda: service._inbox._groups, "the group never came")
    assert service.stats().clips_encoded == 2
    swap = service.stage(whole_vision(service, 1), 0.0)
    gate.go_on.set()
    assert swap.result(timeout=WAIT_S).version == 1
    before, after = (future.result(timeout=WAIT_S)[1] for future in (first, second))
    assert service.stats().clips_encoded == 3
    for task, payload, old in ((tasks[0], before, True), (tasks[1], after, False)):
        off = distances(service, payload, service._frames.read(task, group(task, "").plan).frames)
        assert off.min() > 1e-2 if old else off.max() < 1e-6
    assert {log.single_version for log in after.logs} == {1}
    assert_nothing_waits(service)


def test_a_clip_of_a_tower_that_trains_is_of_one_version_and_is_finished_once_weights_have_overtaken_it(open_it, tasks):
    """Else weights that come often would keep a long clip from ever being encoded."""
    service = open_it(False, boundary=Boundary.NONE)
    running = service.submit(group(tasks[0], "0/long", turns=10))
    wait_until(lambda: service.engine.steps > 12, "the group never ran")
    gate = TowerGate(service, stop_at=2)
    future = service.submit(group(tasks[1], "0/other"))
    assert gate.inside.wait(WAIT_S)
    swap = service.stage(whole_vision(service, 1), 0.0)
    gate.go_on.set()
    assert swap.result(timeout=WAIT_S).version == 1
    summary, payload = future.result(timeout=WAIT_S)
    assert summary.failed is None
    assert {chunk.feature_version for log in payload.logs for chunk in log.chunks} == {1}
    again = [steps for _, steps in gate.calls[2:]]
    assert len(again) > 2
    assert len(set(again)) == 1, "a step came between its slices"
    assert running.result(timeout=WAIT_S)[0].failed is None


# ---- the byte budget ----


@pytest.mark.parametrize("fits", [2, 0], ids=["two clips", "less than one clip"])
def test_no_more_is_encoded_ahead_than_the_budget_has_room_for(open_it, tasks, monkeypatch, fits):
    service = open_it(True)
    clips, gate = clips_of(service), EngineGate(service, monkeypatch)
    nbytes = TURNS * 4 * service.backbone.feature_width * 4
    clips.budget = fits * nbytes + nbytes // 2
    # Clips of as many bytes each, apart by their places in the video.
    shown = [replace(tasks[0], id=f"{i}", start=tasks[0].start + i / 8) for i in range(5)]
    futures = [service.submit(group(task, f"0/{task.id}")) for task in shown]
    assert gate.inside.wait(WAIT_S)
    wait_until(lambda: clips._change._waiters, "the encode thread never waited")
    assert service.stats().clips_encoded == max(fits, 1)
    assert clips.used == nbytes * max(fits, 1)
    gate.go_on.set()
    most = 0
    for future in futures:
        assert future.result(timeout=WAIT_S)[0].failed is None
        most = max(most, clips.used)
    assert most <= max(clips.budget, nbytes)
    assert service.stats().clips_encoded == 5
    assert_nothing_waits(service)


def test_what_comes_with_a_task_counts_while_it_waits(open_it, tasks, monkeypatch):
    service = open_it(True)
    made = roll(service, group(tasks[0], "0/a"))[1]
    clips, gate = clips_of(service), EngineGate(service, monkeypatch)
    clips.outdate()
    futures = [service.submit(group(tasks[0], f"1/{i}", features=made.media)) for i in range(2)]
    wait_until(lambda: clips.used == 2 * made.media.nbytes, "two groups never waited")
    gate.go_on.set()
    assert all(future.result(timeout=WAIT_S)[0].failed is None for future in futures)
    assert (clips.used, service.stats().clips_encoded) == (0, 1)


def test_between_steps_a_clip_waits_for_room_too(open_it, tasks):
    """Each passes alone, as the one before has begun to run."""
    service = open_it(False)
    clips_of(service).budget = 1
    futures = [service.submit(group(task, f"0/{i}")) for i, task in enumerate(tasks)]
    assert [future.result(timeout=WAIT_S)[0].failed for future in futures] == [None] * 3
    assert service.stats().clips_encoded == 3
    assert clips_of(service).used == 0


# ---- the end ----


@AHEAD
def test_closing_ends_a_clip_after_the_slice_that_is_under_way(open_it, tasks, ahead):
    service = open_it(ahead)
    gate = TowerGate(service, stop_at=2)
    futures = [service.submit(group(task, f"0/{i}")) for i, task in enumerate(tasks)]
    assert gate.inside.wait(WAIT_S)
    closing = threading.Thread(target=service.close)
    closing.start()
    wait_until(lambda: clips_of(service)._stopped, "close never came so far")
    gate.go_on.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert len(gate.calls) == 2
    for future in futures:
        with pytest.raises(ServiceClosedError, match="was closed before group 0/"):
            future.result(timeout=0)
    assert not any(t.is_alive() for t in (service._thread, service._prepare._thread))
    assert service._encode is None or not service._encode._thread.is_alive()


def test_closing_wakes_the_encode_thread_where_it_waits_for_room(open_it, tasks, monkeypatch):
    service = open_it(True)
    clips, gate = clips_of(service), EngineGate(service, monkeypatch)
    clips.budget = 1
    futures = [service.submit(group(task, f"0/{i}")) for i, task in enumerate(tasks[:2])]
    assert gate.inside.wait(WAIT_S)
    wait_until(lambda: clips._change._waiters, "the encode thread never waited")
    closing = threading.Thread(target=service.close)
    closing.start()
    service._encode._thread.join(WAIT_S)
    assert not service._encode._thread.is_alive(), "the engine thread still steps, and gives no room"
    gate.go_on.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert service.stats().clips_encoded == 1
    with pytest.raises(ServiceClosedError, match="was closed before group 0/1 was done"):
        futures[1].result(timeout=0)

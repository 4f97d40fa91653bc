"""Groups in a pool that runs full, in a service without Ray: the same logs, and what began anew is counted by its group."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.support.pages import use_pages
from tests.support.service import group, open_service, roll

pytestmark = pytest.mark.slow


@pytest.fixture
def open_on_pages(monkeypatch):
    use_pages(monkeypatch)
    opened = []

    def open_it(setup, **given):
        opened.append(open_service(replace(setup, **given)))
        assert opened[-1].engine.pool.paged
        return opened[-1]

    yield open_it
    for service in opened:
        service.close()


@pytest.fixture
def smallest(setup, tasks, open_on_pages):
    """The bound of one stream, as the error of a pool that is too small names it."""
    summary, payload = roll(open_on_pages(setup, kv_slots=10), group(tasks[0], "0/none"))
    assert payload is None
    return int(re.search(r"stream 0/none/0 may need (\d+) KV slots but the pool holds 10", summary.failed)[1])


def test_a_group_counts_the_streams_that_began_anew_and_its_logs_are_the_same(setup, tasks, open_on_pages, smallest):
    names = ("0/first", "0/second")
    large, small = open_on_pages(setup, kv_slots=4096), open_on_pages(setup, kv_slots=smallest)
    wanted = [roll(large, group(task, name)) for task, name in zip(tasks, names, strict=False)]
    assert [summary.preempted for summary, _ in wanted] == [0, 0]
    # Both at once: the first takes slots from the second.
    futures = [small.submit(group(task, name)) for task, name in zip(tasks, names, strict=False)]
    found = [future.result(timeout=60) for future in futures]
    assert [summary.failed for summary, _ in found] == [None, None]
    assert sum(summary.preempted for summary, _ in found) > 0
    assert small.engine.admission.take_preempted() == [], "every step's are counted"
    assert small.engine.pool.available == smallest
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        for a, b in zip(ours.logs, theirs.logs, strict=True):
            assert a.header == b.header
            assert np.array_equal(a.ids, b.ids)
            assert np.array_equal(a.expiry, b.expiry)
            np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-5)


def test_a_late_group_takes_its_waiting_streams_along(setup, tasks, open_on_pages, smallest, monkeypatch):
    """Given back and waiting, or running: nothing of it is left."""
    rollout = replace(setup.rollout, group_deadline_s=0.2)
    slots = 3 * smallest  # for three times the turns
    service = open_on_pages(setup, kv_slots=slots, rollout=rollout)
    given_back, give_back = [], service.engine.admission.give_back
    monkeypatch.setattr(
        service.engine.admission, "give_back", lambda *streams: (given_back.append(streams), give_back(*streams))
    )
    summary, payload = roll(service, group(tasks[0], "0/late", streams=16, turns=18))
    assert payload is None
    assert summary.failed == "TimeoutError: the group was not finished within rollout.group_deadline_s=0.2"
    assert given_back
    assert not service.engine.busy
    assert service.engine.pool.available == slots
    assert service.engine.admission.take_preempted() == []


def test_an_error_inside_a_step_forgets_whom_it_has_given_back(setup, tasks, open_on_pages, smallest, monkeypatch):
    service = open_on_pages(setup, kv_slots=smallest)
    step, begun = service.engine.step, []

    def step_and_fail():
        begun.append(step())
        # A visit that has given streams back and then fails.
        if service.engine.admission._preempted:
            raise RuntimeError("a kernel failed")
        return begun[-1]

    monkeypatch.setattr(service.engine, "step", step_and_fail)
    summary, payload = roll(service, group(tasks[0], "0/fails"))
    assert payload is None
    assert summary.failed == "RuntimeError: a kernel failed"
    monkeypatch.undo()
    assert service.engine.admission.take_preempted() == []
    assert service.engine.pool.available == smallest

"""Calls of several workers, of which some fail; without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from runtime.cluster.crew import Crew
from runtime.placing.seats import NoRoomError


def asked(replies, least):
    """What `of_workers` returns for workers with these replies, errors among them."""

    def of_worker(worker, send, reference, what, *, start):
        if isinstance(replies[worker], Exception):
            raise replies[worker]
        return reference

    crew = SimpleNamespace(places=SimpleNamespace(workers=list(replies)), _of_worker=of_worker)
    return Crew.of_workers(crew, lambda reply: reply, "load", range(len(replies)), least=least)


def broken(cause):
    return RayTaskError("setup", f"traceback\n{cause}", OSError(cause))


def test_a_worker_that_cannot_load_is_left_out_while_there_are_others_enough(caplog):
    assert asked(["a", broken("no such mount"), "c"], least=2) == {0: "a", 2: "c"}
    assert "rollout worker 1 could not load: no such mount" in caplog.text
    with pytest.raises(RayTaskError, match="no such mount"):
        asked(["a", broken("no such mount")], least=2)
    with pytest.raises(RayTaskError, match="no such mount"):
        asked(["a", broken("no such mount"), "c"], least=None)


def test_a_worker_without_room_is_left_out_in_any_case(caplog):
    assert asked(["a", NoRoomError("no node has room")], least=None) == {0: "a"}
    assert "no node has room: the run goes on without rollout worker 1" in caplog.text

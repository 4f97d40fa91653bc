"""A GCS or raylet that is gone is noticed, and told once; a busy one, and one that comes back, are not taken for lost."""

from __future__ import annotations

import queue
import socket
import time

import pytest

from runtime.recovery import lifeline
from runtime.recovery.lifeline import NATIVE_VARIABLE, SPARE_S, Lifeline, RayLoss, native_s

SOON_S = 30.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lifeline, "GCS_POLL_S", 0.05)
    monkeypatch.setattr(lifeline, "RAYLET_POLL_S", 0.02)


class Ray:
    """Two sockets that take connections, and nobody behind them; the watch over them."""

    def __init__(self, folder, lost_s=0.3) -> None:
        self.gcs = socket.create_server(("127.0.0.1", 0))
        self.port = self.gcs.getsockname()[1]
        self.path = str(folder / "raylet")
        self.raylet = socket.socket(socket.AF_UNIX)
        self.raylet.bind(self.path)
        self.raylet.listen()
        self.told: queue.Queue[RayLoss] = queue.Queue()
        self.watch = Lifeline(f"127.0.0.1:{self.port}", self.path, self.told.put, lost_s)

    def nothing_told(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self.told.empty()


@pytest.fixture
def ray(tmp_path):
    made = Ray(tmp_path)
    made.watch.start()
    yield made
    made.watch.close()
    made.gcs.close()
    made.raylet.close()


def test_processes_that_are_too_busy_to_look_are_there(ray):
    assert ray.nothing_told(1.0)
    assert ray.watch.look() is None


def test_a_gcs_that_is_gone_is_told_once_with_its_address_and_the_time_that_is_left(ray, monkeypatch):
    monkeypatch.setenv(NATIVE_VARIABLE, "100")
    ray.gcs.close()
    loss = ray.told.get(timeout=SOON_S)
    assert f"Ray's GCS at 127.0.0.1:{ray.port} has not answered for " in loss.words
    assert "refused" in loss.words
    assert 50 < loss.usable_s <= 100 - SPARE_S
    assert ray.nothing_told(0.5)


def test_a_gcs_that_starts_anew_in_time_is_waited_for(tmp_path):
    ray = Ray(tmp_path, lost_s=20.0)
    ray.watch.start()
    ray.gcs.close()
    assert ray.nothing_told(1.0), "it may come back for 20 s"
    ray.watch.close()
    ray.raylet.close()


def test_a_raylet_that_is_gone_leaves_no_time(ray):
    ray.raylet.close()
    loss = ray.told.get(timeout=SOON_S)
    assert loss.usable_s == 0
    assert ray.path in loss.words
    assert ray.watch.look() == loss


def test_a_watch_that_was_closed_tells_nothing(ray):
    ray.watch.close()
    ray.gcs.close()
    ray.raylet.close()
    assert ray.nothing_told(1.0)


def test_a_raylet_that_is_out_of_sight_is_not_missed(tmp_path):
    watch = Lifeline("127.0.0.1:1", str(tmp_path / "elsewhere"), lambda loss: None)
    assert watch.look() is None


def test_the_time_that_ray_gives_itself_is_read_from_its_variable(monkeypatch):
    monkeypatch.delenv(NATIVE_VARIABLE, raising=False)
    assert native_s() == 60
    monkeypatch.setenv(NATIVE_VARIABLE, "120")
    assert native_s() == 120

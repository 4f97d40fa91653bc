"""An actor writes where it stands when it is asked, whatever it is doing; others are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from runtime.recovery import stacks
from runtime.recovery.stacks import ask_everywhere, ask_here, end_here
from streams.support.actor_log import ACTOR_VARIABLE, FOLDER_VARIABLE, log_path
from streams.support.doing import read_of
from tests.support.project import ROOT

STANDS_STILL = """
import ctypes
from streams.support.actor_log import open_actor_log
from streams.support.doing import doing
open_actor_log()
def stands_still():
    ctypes.CDLL(None).sleep(60)
with doing("optimiser step 3"):
    with doing("forward"):
        stands_still()
"""


@pytest.fixture
def start(tmp_path):
    """Start a program as an actor of this folder; ended after the test."""
    running = []

    def started(name: str, program: str) -> subprocess.Popen:
        environment = os.environ | {ACTOR_VARIABLE: name, FOLDER_VARIABLE: str(tmp_path)}
        running.append(subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment))
        return running[-1]

    yield started
    for process in running:
        process.kill()
        process.wait()


def await_standing_still(process: subprocess.Popen) -> None:
    give_up = time.monotonic() + 60
    while len(read_of(process.pid)) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_an_actor_that_stands_still_in_native_code_says_where_and_its_children_live_on(tmp_path, start):
    actor = start("learner", STANDS_STILL)
    child = start("learner", "import time; time.sleep(60)")
    await_standing_still(actor)
    (name, doing), *others = ask_here(str(tmp_path)).items()
    assert (name, others) == ("learner", [])
    assert [line.rpartition(",")[0] for line in doing] == ["MainThread: optimiser step 3", "MainThread: forward"]
    said = log_path(tmp_path, "learner").read_text()
    assert "most recent call first" in said
    assert "in stands_still" in said
    assert "learner was asked what it is doing: MainThread: forward, for " in said
    assert child.poll() is None, "it does not listen for the signal, which would end it"
    assert ask_here(str(tmp_path / "another")) == {}


def test_without_an_answer_of_ray_those_of_this_node_are_asked_all_the_same(tmp_path, start, monkeypatch):
    """As without a GCS, when Ray's own calls do not return."""
    monkeypatch.setattr(stacks, "ASK_S", 0.2)
    monkeypatch.setattr(stacks, "live_nodes", lambda: time.sleep(60))
    actor = start("learner", STANDS_STILL)
    await_standing_still(actor)
    said = ask_everywhere(tmp_path)
    assert "stacks of learner are at the end" in said
    assert "Ray does not answer" in said
    assert "learner: MainThread: optimiser step 3, for " in said


def test_the_actors_of_a_folder_are_ended_with_their_children_and_no_others(tmp_path, start):
    mine = [start("learner", STANDS_STILL), start("learner", "import time; time.sleep(60)")]
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        end_here(tmp_path)
        assert [process.wait(timeout=30) for process in mine] == [-signal.SIGKILL] * 2
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()

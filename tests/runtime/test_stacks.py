"""An actor writes where it stands when it is asked, whatever it is doing; others are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from runtime.recovery.stacks import ask_here
from streams.support.actor_log import ACTOR_VARIABLE, FOLDER_VARIABLE, STARTS, log_path
from tests.support.project import ROOT

STANDS_STILL = """
import ctypes
from streams.support.actor_log import open_actor_log
open_actor_log()
def stands_still():
    ctypes.CDLL(None).sleep(60)
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


def test_an_actor_that_stands_still_in_native_code_says_where_and_its_children_live_on(tmp_path, start):
    start("learner", STANDS_STILL)
    child = start("learner", "import time; time.sleep(60)")
    log = log_path(tmp_path, "learner")
    give_up = time.monotonic() + 60
    while not (log.exists() and STARTS in log.read_text()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert ask_here(str(tmp_path)) == ["learner"]
    said = log.read_text()
    assert "most recent call first" in said
    assert "in stands_still" in said
    assert child.poll() is None, "it does not listen for the signal, which would end it"
    assert ask_here(str(tmp_path / "another")) == []

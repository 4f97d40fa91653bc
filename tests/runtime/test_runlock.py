"""One run at a time in a run_root, with real processes: held, killed, frozen, on another machine, without locks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.store import runlock
from runtime.store.runlock import RunLock, RunRootBusyError
from tests.support.project import ROOT

HOLD = """
import sys, time
from pathlib import Path
from runtime.store.runlock import RunLock
with RunLock(Path(sys.argv[1]), beat_s=0.1, stale_s=1.0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts processes that hold the lock of tmp_path; ends them with the test."""
    running = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def lock(root):
    return RunLock(root, beat_s=0.1, stale_s=1.0)


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do():
    with pytest.raises(OSError, match=r"run_root=/proc/none cannot be written \(.*\): choose another"):
        RunLock(Path("/proc/none")).acquire()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path, hold):
    holder = hold()
    began = time.monotonic()
    with pytest.raises(RunRootBusyError, match=rf"run_root={tmp_path} is in use by another run: pid {holder.pid} on "):
        lock(tmp_path).acquire()
    assert time.monotonic() - began < 0.5


def test_the_refused_one_does_not_disturb_the_holder(tmp_path, hold):
    holder = hold()
    for _ in range(2):
        with pytest.raises(RunRootBusyError, match=f"pid {holder.pid}"):
            lock(tmp_path).acquire()


def test_a_killed_holder_is_replaced_at_once_with_a_message(tmp_path, hold, caplog):
    holder = hold()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with lock(tmp_path) as mine:
        assert time.monotonic() - began < 0.5
        assert mine.taken_over.pid == holder.pid
        assert f"taking over from a run that ended without saying so, pid {holder.pid}" in caplog.text
        with pytest.raises(RunRootBusyError, match=f"pid {os.getpid()}"):
            lock(tmp_path).acquire()


def test_a_released_lock_is_free_and_nobody_is_said_to_have_died(tmp_path):
    with lock(tmp_path) as first:
        assert first.taken_over is None
    with lock(tmp_path) as second:
        assert second.taken_over is None
        second.check()


def test_a_child_that_outlives_its_run_does_not_keep_the_lock(tmp_path, hold):
    with lock(tmp_path):
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        with lock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def elsewhere(root, token="far"):
    """What the lock file looks like when a run on another machine has written it."""
    holder = {"host": "far", "machine": "m", "pid": 7, "started": "then", "command": "launch.py", "token": token}
    (root / ".lock").write_text(json.dumps(holder))


def test_a_holder_on_another_machine_that_beats_is_not_replaced(tmp_path):
    elsewhere(tmp_path)
    beating = subprocess.Popen(["sh", "-c", f"while :; do sleep 0.2; touch {tmp_path / '.lock'}; done"])
    try:
        with pytest.raises(RunRootBusyError, match="pid 7 on far"):
            lock(tmp_path).acquire()
    finally:
        beating.kill()
        beating.wait()


def test_a_beat_is_seen_although_the_holders_clock_was_set_back(tmp_path):
    elsewhere(tmp_path)
    past = time.time_ns() - 3600 * 10**9
    beat = threading.Timer(0.4, lambda: os.utime(tmp_path / ".lock", ns=(past, past)))
    beat.start()
    try:
        with pytest.raises(RunRootBusyError, match="pid 7 on far"):
            lock(tmp_path).acquire()
    finally:
        beat.join(timeout=10)


def test_a_holder_on_another_machine_that_has_stopped_is_replaced_after_a_while(tmp_path, caplog):
    elsewhere(tmp_path)
    began = time.monotonic()
    with lock(tmp_path) as mine:
        assert 1.0 <= time.monotonic() - began < 3
        assert mine.taken_over.host == "far"
    assert "waiting up to 1 s for a sign of life" in caplog.text


def test_whoever_lost_the_lock_while_frozen_notices_and_leaves_it_alone(tmp_path):
    mine = lock(tmp_path).acquire()
    elsewhere(tmp_path)
    deadline = time.monotonic() + 5
    while not mine._lost and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match=r"another run took over .* \(pid 7 on far"):
        mine.check()
    mine.release()
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "far"


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that answers flock with ENOLCK."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(runlock, "CLAIM_S", 0.6)


def test_without_locks_a_beating_holder_is_still_respected(tmp_path, hold, no_locks):
    holder = hold()
    with pytest.raises(RunRootBusyError, match=f"pid {holder.pid}"):
        lock(tmp_path).acquire()


def test_without_locks_a_killed_holder_is_replaced_after_a_while(tmp_path, hold, no_locks):
    holder = hold()
    holder.kill()
    holder.wait()
    with lock(tmp_path) as mine:
        assert mine.taken_over.pid == holder.pid


def test_without_locks_of_two_that_claim_at_once_one_gives_way(tmp_path, no_locks):
    other = threading.Timer(0.1, elsewhere, [tmp_path])
    other.start()
    try:
        with pytest.raises(RunRootBusyError, match="pid 7 on far"):
            lock(tmp_path).acquire()
    finally:
        other.join()


def test_whoever_only_looks_takes_nothing_and_sees_a_living_holder(tmp_path, hold):
    assert lock(tmp_path).look() is None
    assert list(tmp_path.iterdir()) == []
    holder = hold()
    with pytest.raises(RunRootBusyError, match=rf"in use by another run: pid {holder.pid} on "):
        lock(tmp_path).look()
    holder.kill()
    holder.wait()
    before = (tmp_path / ".lock").read_bytes()
    assert lock(tmp_path).look().pid == holder.pid
    assert (tmp_path / ".lock").read_bytes() == before
    with lock(tmp_path) as taken:
        assert taken.taken_over.pid == holder.pid


def test_whoever_only_looks_watches_a_holder_on_another_machine_for_a_sign_of_life(tmp_path):
    file = tmp_path / ".lock"
    other = json.dumps(dataclasses.asdict(dataclasses.replace(runlock.Holder.this_process(), machine="another")))
    file.write_text(other)
    assert lock(tmp_path).look().machine == "another"
    beats = threading.Timer(0.3, lambda: os.utime(file))
    beats.start()
    with pytest.raises(RunRootBusyError):
        lock(tmp_path).look()
    beats.join()
    assert file.read_text() == other

"""SIGTERM, in processes of their own: a checkpoint within the grace time, and a status that means "again"."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.project import ROOT

PROGRAM = """
import sys, time
from runtime.stop import Requeue, StopSignal
stop = StopSignal(grace_s={grace}, status=75)
stop.install()
stop.last_checkpoint = "here"
try:
    {body}
except Requeue as asked:
    print("asked:", asked, flush=True)
    sys.exit(stop.status)
"""
LAUNCH = ["job=data", "checkpoint.requeue_status=99"]
LOOP = """with stop.deferred():
        print("ready", flush=True)
        while not stop.requested:
            time.sleep(0.01)
        time.sleep({writes})
        print("checkpoint written", flush=True)
        raise Requeue("stopped at step 3")"""


def ended(body, grace=5.0, signals=1, number=signal.SIGTERM):
    """(status, output, error output, seconds) of PROGRAM after a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(grace=grace, body=body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(number)
        time.sleep(0.1)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("signals", [1, 3])
def test_a_training_loop_writes_its_checkpoint_and_ends_with_the_requeue_status(signals, number):
    status, out, _, _ = ended(LOOP.format(writes=0.3), signals=signals, number=number)
    assert status == 75
    assert out == "checkpoint written\nasked: stopped at step 3\n"


def test_a_checkpoint_that_takes_too_long_does_not_keep_the_process_alive():
    status, out, err, seconds = ended(LOOP.format(writes=30), grace=0.5)
    assert status == 75
    assert "checkpoint written" not in out
    assert "checkpoint.grace_s=0.5" in err
    assert "the last complete one is here" in err
    assert seconds < 20


def test_whoever_catches_the_failures_of_a_part_does_not_swallow_it():
    status, out, _, _ = ended(
        """print("ready", flush=True)
    try:
        time.sleep(30)
    except Exception:
        print("transcripts: not written")
        time.sleep(30)"""
    )
    assert status == 75
    assert "not written" not in out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it asks Linux whether the handler is there")
@pytest.mark.parametrize("seconds", [0.0, 1.5, 3.0])
def test_a_program_that_still_loads_ends_with_the_requeue_status(tmp_path, seconds):
    process = subprocess.Popen([sys.executable, "launch.py", *LAUNCH, f"run_root={tmp_path}"], cwd=ROOT)
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> signal.SIGTERM - 1 & 1:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 99


def test_outside_a_loop_the_run_ends_at_once():
    status, out, _, seconds = ended('print("ready", flush=True); time.sleep(30)')
    assert status == 75
    assert "the last complete checkpoint is here" in out
    assert seconds < 20


def test_a_library_that_takes_the_signal_over_does_not_keep_it():
    """As `ray.init` does: its handler exits with a status of its own."""
    theirs = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))"
    body = f"""import signal
    with stop.lent():
        {theirs}
        print("ready", flush=True)
        time.sleep(30)"""
    status, out, _, seconds = ended(body)
    assert status == 75
    assert "stopped while Ray was starting" in out
    assert seconds < 20
    body = f"""import signal
    with stop.lent():
        {theirs}
    print("ready", flush=True)
    time.sleep(30)"""
    status, out, _, _ = ended(body)
    assert status == 75
    assert "stopped between the stages' steps" in out


def test_under_nohup_a_terminal_that_goes_away_ends_nothing():
    program = PROGRAM.format(grace=5.0, body='print("ready", flush=True); time.sleep(0.5); print("went on")')
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "went on\n"
    assert process.returncode == 0


LOSES = """import threading
    import runtime.stop
    runtime.stop.CLOSES_S = 1.0
    threading.Timer({after}, lambda: stop.lose("Ray is gone", {usable})).start()
    {then}"""


@pytest.mark.parametrize(
    ("usable", "then", "said"),
    [
        # A loop writes its checkpoint as if it had been asked to stop.
        (5.0, LOOP.format(writes=0.2), "checkpoint written\nasked: stopped at step 3\n"),
        # It takes too long, or nothing can be written any more: it is interrupted.
        (0.3, LOOP.format(writes=30), "asked: no further checkpoint was written, the last complete one is here\n"),
        (0.0, LOOP.format(writes=30), "asked: no further checkpoint was written, the last complete one is here\n"),
        # Outside of a loop there is nothing to write.
        (5.0, 'print("ready", flush=True); time.sleep(30)', "asked: stopped between the stages' steps"),
    ],
)
def test_a_loss_interrupts_like_a_signal_and_is_kept_in_words(usable, then, said):
    body = LOSES.format(after=0.5, usable=usable, then=then)
    status, out, _, seconds = ended(body, signals=0)
    assert status == 75, "the caller decides by `loss`"
    assert said in out
    assert seconds < 20


def test_a_loss_ends_a_process_that_nothing_can_interrupt():
    stuck = """print("ready", flush=True)
    import ctypes
    for _ in range(9):
        try:
            ctypes.CDLL(None).sleep(30)
        except Requeue:
            pass"""
    status, _, err, seconds = ended(LOSES.format(after=0.5, usable=0.0, then=stuck), signals=0)
    assert status == 1
    assert "error: Ray is gone" in err
    assert "goes on from here" in err
    assert seconds < 20

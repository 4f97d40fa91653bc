"""What a process is doing can be read from outside, whatever state it is in; and it costs nothing to say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from streams.support.doing import NAME, SLOT_BYTES, SLOTS, doing, read_of
from tests.support.project import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that others can read")


def here() -> list[tuple[str, str]]:
    return [(entry.thread, entry.what) for entry in read_of(os.getpid())]


def fails() -> None:
    with doing("fails"):
        raise KeyError


def test_blocks_nest_end_with_an_error_and_differ_by_thread():
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with doing("reads clip 7"):
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=other, name="prepare")
    with doing("optimiser step 3"):
        thread.start()
        assert inside.wait(60)
        with doing("forward"):
            outer, inner, beside = here()
        assert (outer, inner) == (("MainThread", "optimiser step 3"), ("MainThread", "forward"))
        assert beside == ("prepare", "reads clip 7")
        with pytest.raises(KeyError):
            fails()
        assert here() == [("MainThread", "optimiser step 3"), ("prepare", "reads clip 7")]
        over.set()
        thread.join(60)
    assert here() == []


def test_long_words_are_cut_and_too_many_are_left_out():
    with doing("line\n" + "x" * 10 * SLOT_BYTES):
        (entry,) = read_of(os.getpid())
    assert entry.what.startswith("line xxx")
    opened = [doing(f"number {i}") for i in range(SLOTS + 5)]
    for block in opened:
        block.__enter__()
    assert len(read_of(os.getpid())) == SLOTS
    for block in opened:
        block.__exit__(None, None, None)
    assert here() == []
    with doing("works again"):
        assert [what for _, what in here()] == ["works again"]


def test_a_stopped_process_tells_it_and_a_fork_does_not_write_over_its_parent():
    program = f"""
import os, time
from streams.support.doing import doing
with doing("waits for ever"):
    if os.fork() == 0:
        with doing("the child's"):
            time.sleep(0.5)
        os._exit(0)
    os.wait()
    print("{NAME}", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == NAME
            process.send_signal(signal.SIGSTOP)
            (entry,) = read_of(process.pid)
            assert (entry.thread, entry.what) == ("MainThread", "waits for ever")
        finally:
            process.kill()
    assert read_of(process.pid) == []

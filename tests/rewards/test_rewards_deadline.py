"""Rewards that never end: they cost their stream, with the line where they were, and nothing else."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from rewards.compose import Reward, RewardConfig
from rewards.deadline import OutOfTimeError, deadline
from tests.support.project import ROOT
from tests.support.rewards import one_answer, outcome

LIMIT_S = 0.2


def sleeps(given):
    time.sleep(60)
    return [1.0]


def tries_again_for_ever(given):
    while True:
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - what careless code does
            continue


def counts_for_ever(given):
    while True:
        pass


def swallows_everything(given):
    for _ in range(2):
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001 - what reckless code does
            continue
    time.sleep(60)
    return [1.0]


@pytest.mark.parametrize("term", [sleeps, tries_again_for_ever, counts_for_ever, swallows_everything])
def test_a_term_that_never_ends_costs_its_stream_and_is_named_with_its_line(term):
    reward = Reward({"mine": (term, 1.0)}, "product", LIMIT_S)
    began = time.monotonic()
    result = reward(outcome(one_answer(), {}))
    assert time.monotonic() - began < 30
    assert result.total == 0
    assert "reward.terms.mine: took longer than 0.2 s (reward.timeout_s), last in " in result.failed
    assert f"{__file__}:" in result.failed
    assert Reward({"mine": (lambda given: [1.0], 1.0)}, "product", LIMIT_S)(outcome(one_answer(), {})).failed is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


STUCK = """
import sys
from rewards.compose import Reward
from rewards.deadline import WATCHDOG
from tests.support.deadly_reward import Deadly
from tests.support.project import ROOT
from tests.support.rewards import one_answer, outcome

file = open(sys.argv[1], "w")
WATCHDOG.start(lambda: file)
soon = Reward({"mine": (Deadly(), 1.0)}, "product", 0.1)
assert soon(outcome(one_answer(), {})).total == 1
Reward({"mine": (Deadly(hangs="task"), 1.0)}, "product", 0.1)(outcome(one_answer(), {}))
"""


def test_code_that_cannot_be_interrupted_ends_its_process_with_its_line(tmp_path):
    """No signal reaches it, and no other thread of Python's runs."""
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path / "log")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    said = (tmp_path / "log").read_text()
    assert said.startswith("Timeout (0:00:03.1")
    reward, caller = [line for line in said.splitlines() if "File" in line][:2]
    assert re.search(r'deadly_reward\.py", line \d+ in __call__', reward)
    assert re.search(r'rewards/compose\.py", line \d+ in _call_terms', caller)


def test_the_handler_before_is_back_and_who_is_in_time_notices_nothing():
    before = signal.getsignal(signal.SIGALRM)
    with deadline(30):
        assert signal.getsignal(signal.SIGALRM) is not before
    assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(OutOfTimeError, match=r"took longer than 0\.1 s"), deadline(0.1):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) is before


def test_in_another_thread_there_is_no_deadline():
    went: list[bool] = []

    def work() -> None:
        with deadline(0.05):
            time.sleep(0.2)
        went.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert went == [True]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_deadline_that_means_nothing_is_refused(value):
    with pytest.raises(ValueError, match=r"reward\.timeout_s"):
        RewardConfig(terms={"correctness": {}}, timeout_s=value)


def test_a_run_without_a_scorer_is_refused():
    with pytest.raises(ValueError, match=r"reward\.workers=0 must be at least 1"):
        RewardConfig(terms={"correctness": {}}, workers=0)

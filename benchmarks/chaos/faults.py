"""What is done to a run: which process is hit, how, and what shows that the run has come over it.

Invariant: a hit is made while the run trains, a random time after a step; the next one only when it has recovered.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.chaos.subject import Subject
from tests.support.killed_runs import pid_of

HUNG_S = 240.0
"""Without any step for so long a run counts as hung."""
LONGEST_WAIT_S = 4.0
PAUSE_S = 5.0
POLL_S = 0.05


@dataclass(frozen=True)
class Hit:
    """kind: of KINDS. at: the last step before it. recovered_s: until the run went on; None: it never did."""

    kind: str
    at: str
    recovered_s: float | None


Fault = Callable[[Subject, random.Random], None]
"""Hits a run, and waits until it has come over it."""


class Hung(RuntimeError):
    """The run makes no step any more."""


def wait_until(subject: Subject, there: Callable[[], bool]) -> None:
    """Until it is there, or the run has ended. Raises Hung."""
    give_up = time.monotonic() + HUNG_S
    while not subject.ended and not there():
        if time.monotonic() > give_up:
            raise Hung(f"nothing for {HUNG_S:g} s")
        time.sleep(POLL_S)


def _strike(subject: Subject, actor: str, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid_of(subject.root, actor), number)


def _kill(subject: Subject, actor: str) -> None:
    _strike(subject, actor, signal.SIGKILL)


def replaced(actor: str, lose: Callable[[Subject, str], None] = _kill) -> Fault:
    """Kill an actor; wait until the run says that it has another one. lose: kills it in another way."""

    def hit(subject: Subject, chance: random.Random) -> None:
        name = actor.format(chance.randrange(2))
        before = subject.told(rf"{name} died \(")
        steps = len(subject.steps())
        there = subject.told(rf"{name} is there again")
        lose(subject, name)
        wait_until(subject, lambda: subject.told(rf"{name} died \(") > before or len(subject.steps()) > steps + 8)
        if name.startswith("rollout"):
            wait_until(
                subject,
                lambda: subject.told(rf"{name} is there again") > there or len(subject.steps()) > steps + 8,
            )
        else:
            now = len(subject.steps())
            wait_until(subject, lambda: len(subject.steps()) > now)

    return hit


def _hangs(subject: Subject, chance: random.Random) -> None:
    """Stop a worker for good: it is ended, and another one takes its place."""
    name = f"rollout-{chance.randrange(2)}"
    there = subject.told(rf"{name} is there again")
    _strike(subject, name, signal.SIGSTOP)
    wait_until(subject, lambda: subject.told(rf"{name} is there again") > there)


def _learner_hangs(subject: Subject, chance: random.Random) -> None:
    """Stop the learner for good: it is ended, and the stage goes on from its newest checkpoint."""
    before = subject.told(r"learner died \(")
    _strike(subject, "learner", signal.SIGSTOP)
    wait_until(subject, lambda: subject.told(r"learner died \(") > before)
    now = len(subject.steps())
    wait_until(subject, lambda: len(subject.steps()) > now)


def _pauses(actor: str) -> Fault:
    """Stop an actor for a while."""

    def hit(subject: Subject, chance: random.Random) -> None:
        name = actor.format(chance.randrange(2))
        pid = pid_of(subject.root, name)
        for number, seconds in ((signal.SIGSTOP, PAUSE_S), (signal.SIGCONT, 0.0)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            time.sleep(seconds)
        now = len(subject.steps())
        wait_until(subject, lambda: len(subject.steps()) > now)

    return hit


def _driver(number: int) -> Fault:
    """End the driver, and type its command again."""

    def hit(subject: Subject, chance: random.Random) -> None:
        subject.look()
        subject.driver.signal(number)
        subject.driver.wait()
        subject.start()
        wait_until(subject, lambda: bool(subject.steps()))

    return hit


KINDS: dict[str, Fault] = {
    "worker": replaced("rollout-{}"),
    "worker hangs": _hangs,
    "worker pauses": _pauses("rollout-{}"),
    "scorer": replaced("scorer"),
    "scorer pauses": _pauses("scorer"),
    "learner": replaced("learner"),
    "learner hangs": _learner_hangs,
    "learner pauses": _pauses("learner"),
    "driver": _driver(signal.SIGKILL),
    "driver is asked to stop": _driver(signal.SIGTERM),
}
"""What may be done, and how it is come over."""


def strike(subject: Subject, kind: str, chance: random.Random, kinds: Mapping[str, Fault] = KINDS) -> Hit | None:
    """Hit a run a random time after its next step; returns None if it ended before. Raises Hung."""
    now = len(subject.steps())
    wait_until(subject, lambda: len(subject.steps()) > now)
    time.sleep(chance.uniform(0, LONGEST_WAIT_S) if kind != "driver" else chance.uniform(0, 1.0))
    if subject.ended:
        return None
    subject.look()
    steps = subject.steps()
    at = steps[-1] if steps else "start"
    began = time.monotonic()
    kinds[kind](subject, chance)
    subject.look()
    return Hit(kind, at, time.monotonic() - began)


def signature(output: str) -> list[str]:
    """Lines of an ended run's output that no user should see."""
    return re.findall(r"^Traceback \(most recent call last\):.*$", output, re.MULTILINE)

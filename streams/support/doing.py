"""What the threads of a process are doing, or waiting for, and since when: for whoever asks where a run stands.

It is kept in memory that another process of this machine can read (`read_of`), so that a process tells it that hangs in
native code or is stopped. Nothing is written to a disk.

Invariants:
* `doing` costs microseconds, fails never, and does nothing where the system has no such memory, or when SLOTS are taken;
* what is read may be torn while it changes: such an entry is left out.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAME = "sightline-doing"
SLOTS, SLOT_BYTES = 64, 256
_END = b"\n"


@dataclass(frozen=True)
class Doing:
    """thread: its name. since: by `time.monotonic`, which all processes of a machine share."""

    thread: str
    since: float
    what: str

    def __str__(self) -> str:
        return f"{self.thread}: {self.what}, for {time.monotonic() - self.since:.0f} s"


class _Board:
    def __init__(self) -> None:
        self._file = os.memfd_create(NAME)
        os.ftruncate(self._file, SLOTS * SLOT_BYTES)
        self._memory = mmap.mmap(self._file, SLOTS * SLOT_BYTES)
        # Lists are changed in one step, so no lock is held that a fork could leave locked.
        self._free = list(range(SLOTS))

    def enter(self, what: str) -> int | None:
        try:
            slot = self._free.pop()
        except IndexError:
            return None
        text = f"{threading.current_thread().name}\t{time.monotonic():.6f}\t{what}".replace("\n", " ").encode()
        line = text[: SLOT_BYTES - len(_END)] + _END
        at = slot * SLOT_BYTES
        self._memory[at : at + len(line)] = line
        return slot

    def leave(self, slot: int) -> None:
        self._memory[slot * SLOT_BYTES] = 0
        self._free.append(slot)


def _make() -> _Board | None:
    with contextlib.suppress(AttributeError, OSError):  # not Linux; no memory, or no descriptor left
        return _Board()
    return None


_board = _make()


def _after_fork() -> None:
    """Give a child a board of its own: it shares its parent's memory."""
    global _board
    _board = _make()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what this thread does, or waits for, in the block. Blocks may nest."""
    board = _board
    slot = None if board is None else board.enter(what)
    try:
        yield
    finally:
        if board is not None and slot is not None:
            board.leave(slot)


def read_of(pid: int) -> list[Doing]:
    """Return what the threads of a process of this machine are doing, the outermost first; [] if it does not tell."""
    with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link).startswith(f"/memfd:{NAME}"):
                return sorted(_parsed(link.read_bytes()), key=lambda entry: (entry.thread, entry.since))
    return []


def _parsed(memory: bytes) -> Iterator[Doing]:
    for at in range(0, len(memory), SLOT_BYTES):
        text, end, _ = memory[at : at + SLOT_BYTES].partition(_END)
        fields = text.decode(errors="replace").split("\t", 2)
        if end and len(fields) == 3 and text[:1] != b"\0":
            with contextlib.suppress(ValueError):
                yield Doing(fields[0], float(fields[1]), fields[2])

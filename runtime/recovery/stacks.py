"""Where the actors of a run stand when it gives up waiting: what each of their threads is doing or waits for, and its stack.

Invariants:
* an actor is asked by a signal (`streams.support.actor_log`), so it answers whatever it is doing, but for one that is stopped;
* only processes that listen for the signal get it: it would end any other;
* Ray is waited for no longer than ASK_S, and its failure is said, not raised: the run ends with an error already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.placing.preflight import live_nodes
from streams.support.actor_log import ACTOR_VARIABLE, FOLDER_VARIABLE, STACKS_SIGNAL, log_path
from streams.support.doing import read_of

ASK_S = 10.0
WRITES_S = 1.0
"""What an actor is given to write."""
SHOWN = 12
"""Actors whose doings are shown on the terminal."""


def ask_here(folder: str) -> dict[str, list[str]]:
    """Have the actors on this node that log to `folder` write their stacks; returns by name what their threads are doing.

    That is written beside the stacks, and does not need the actor to react.
    """
    asked: dict[str, list[str]] = {}
    for pid, name in _actors_here(folder).items():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if _listens(Path(f"/proc/{pid}")):
                asked[name] = [str(doing) for doing in read_of(pid)]
                os.kill(pid, STACKS_SIGNAL)
    time.sleep(WRITES_S)
    for name, lines in asked.items():
        with contextlib.suppress(OSError), log_path(Path(folder), name).open("a") as log:
            log.write("".join(f"{name} was asked what it is doing: {line}\n" for line in lines))
    return asked


def end_here(folder: Path) -> None:
    """End the actors on this node that log to `folder`, and their children, without asking Ray."""
    for pid in _actors_here(str(folder)):
        with contextlib.suppress(OSError):  # it ended meanwhile
            os.kill(pid, signal.SIGKILL)


def _actors_here(folder: str) -> dict[int, str]:
    """Return the names of the processes on this node that log to `folder`, those of their children included."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            pairs = (pair.partition(b"=") for pair in (process / "environ").read_bytes().split(b"\0"))
            values = {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs}
            if values.get(FOLDER_VARIABLE) == folder:
                found[int(process.name)] = values.get(ACTOR_VARIABLE, process.name)
    return found


def _listens(process: Path) -> bool:
    """Whether a process has a handler for the signal: a child of an actor has none, nor one that is just starting."""
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)


def ask_everywhere(folder: Path) -> str:
    """Have all actors of the run write their stacks into their logs; returns who did, and what they are doing, in words."""
    found: dict[str, list[str]] = {}
    failed: list[str] = []

    def ask() -> None:
        try:
            found.update(_ask_nodes(folder))
        except RayError as error:
            failed.append(type(error).__name__)

    # Without a GCS, Ray's own calls return at no time limit.
    asking = threading.Thread(target=ask, name="stacks", daemon=True)
    asking.start()
    asking.join(2 * ASK_S)
    why = ""
    if failed or asking.is_alive():
        # Ray itself may be what hangs; the driver's own node needs no Ray.
        why = f" ({failed[0] if failed else 'Ray does not answer'}: of this node only)"
        found = ask_here(str(folder))
    names = ", ".join(sorted(found)) or "no actor"
    lines = [f"  {name}: {'; '.join(doing) or 'nothing that has a name'}" for name, doing in sorted(found.items())]
    left = [f"  ... and {len(lines) - SHOWN} more, in their logs"] if len(lines) > SHOWN else []
    return "\n".join([f"stacks of {names} are at the end of their logs in {folder}{why}", *lines[:SHOWN], *left])


def _ask_nodes(folder: Path) -> dict[str, list[str]]:
    ask = ray.remote(num_cpus=0)(ask_here)
    replies = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(str(folder))
        for node in live_nodes()
    ]
    return {name: doing for found in ray.get(replies, timeout=ASK_S) for name, doing in found.items()}

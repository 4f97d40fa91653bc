"""Where the actors of a run stand when it gives up waiting: each writes the stacks of all its threads into its own log.

Invariants:
* an actor is asked by a signal (`streams.support.actor_log`), so it answers whatever it is doing, but for one that is stopped;
* only processes that listen for the signal get it: it would end any other;
* replies are waited for no longer than ASK_S, and a failure of Ray is said, not raised: the run ends with an error already.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.placing.preflight import live_nodes
from streams.support.actor_log import ACTOR_VARIABLE, FOLDER_VARIABLE, STACKS_SIGNAL

ASK_S = 10.0
WRITES_S = 1.0
"""What an actor is given to write."""


def ask_here(folder: str) -> list[str]:
    """Have the actors on this node that log to `folder` write their stacks; returns their names."""
    asked = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            pairs = (pair.partition(b"=") for pair in (process / "environ").read_bytes().split(b"\0"))
            values = {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs}
            if values.get(FOLDER_VARIABLE) == folder and _listens(process):
                os.kill(int(process.name), STACKS_SIGNAL)
                asked.append(values.get(ACTOR_VARIABLE, process.name))
    time.sleep(WRITES_S)
    return sorted(asked)


def _listens(process: Path) -> bool:
    """Whether a process has a handler for the signal: a child of an actor has none, nor one that is just starting."""
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)


def ask_everywhere(folder: Path) -> str:
    """Have all actors of the run write their stacks into their logs; returns who did, in words."""
    try:
        ask = ray.remote(num_cpus=0)(ask_here)
        replies = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(str(folder))
            for node in live_nodes()
        ]
        names = sorted({name for found in ray.get(replies, timeout=ASK_S) for name in found})
    except RayError as error:
        # Ray itself may be what hangs; the driver's own node needs no Ray.
        names = ask_here(str(folder))
        return f"stacks of {', '.join(names) or 'no actor'} are at the end of their logs in {folder} ({type(error).__name__})"
    return f"stacks of {', '.join(names) or 'no actor'} are at the end of their logs in {folder}"

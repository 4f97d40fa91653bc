"""Names of the actors of a run, where their logs are, and what to say when one dies.

Invariants:
* an actor has one short name everywhere: in Ray, as process title, log file and in messages;
* two runs on one cluster never share a name.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError

from streams.support.actor_log import ACTOR_VARIABLE, FOLDER_VARIABLE, STARTS, log_path

TAIL_LINES = 15
TAIL_BYTES = 65536
LINE_CHARACTERS = 300
CRASH, STUCK = "Fatal Python error", "Timeout ("
"""How Python's own report of a crash begins, and that of a reward that was stuck (`rewards.deadline`)."""
OUTSIDE = re.compile(r"SIGTERM|preempted|drained|node has died|node was terminated", re.IGNORECASE)
"""What Ray says of a death that nothing in the process has caused."""
_FRAME = re.compile(r'\s*File "(.+)", line (\d+) in (.+)')
_CALLER = "/rewards/compose.py"
"""Whoever it calls is a reward."""


def run_id(root: Path) -> str:
    """Return a readable and unique name of this run: the folder's name, the time, the driver's pid."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', root.name) or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def short_name(bundle: str) -> str:
    """Return an actor's short name: `rollout-0` for `rollout worker 0`, `learner-1` for `learner rank 1`, `scorer-1`."""
    return re.sub(r" (?:worker |rank )?(?=\d)", "-", bundle)


@dataclass
class ActorBook:
    """The actors of one session, by Ray's ids."""

    run: str
    log_folder: Path

    def __post_init__(self) -> None:
        self._names: dict[str, str] = {}

    @property
    def namespace(self) -> str:
        return f"sightline-{self.run}"

    def ray_name(self, name: str, again: int = 0) -> str:
        """again: how many actors of this name there were before."""
        return f"sightline/{self.run}/{name}" + (f".{again}" if again else "")

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment variables that `streams.support.actor_log` reads in the actor's process."""
        return {ACTOR_VARIABLE: name, FOLDER_VARIABLE: str(self.log_folder)}

    def add(self, name: str, handle: Any) -> None:
        self._names[handle._actor_id.hex()] = name

    def name_of(self, error: RayActorError) -> str:
        """Return the short name of the actor that died; empty if that is not known."""
        return self._names.get(error.actor_id or "", "")

    def cause_inside(self, error: RayActorError) -> str | None:
        """Return what an actor died of, in a line, if what it was doing can be the cause; None if it came from outside.

        Ray does not say of which signal a process died. What crashes leaves a report in its log (faulthandler), unlike what is
        killed by hand.
        """
        text = str(error)
        if isinstance(error, ActorUnavailableError) or error.preempted or OUTSIDE.search(text):
            return None
        crash = _crash(_lines(log_path(self.log_folder, self.name_of(error))))
        if crash:
            return crash[0]
        return None if _NO_CAUSE in text else _cause(text).splitlines()[-1].strip()

    def explain(self, error: RayActorError) -> str:
        """Return which actor died, where, of what, and the end of its log."""
        text = str(error)
        name = self.name_of(error) or _field(text, "class_name") or "an actor"
        place = [f"node {ip}"] if (ip := _field(text, "ip")) else []
        place += [f"pid {pid}"] if (pid := _field(text, "pid")) else []
        died = f"{name} died ({', '.join(place)})" if place else f"{name} died"
        path = log_path(self.log_folder, name)
        crash = _crash(_lines(path))
        stuck = crash and crash[0].startswith(STUCK)
        cause = "its reward took longer than reward.timeout_s and could not be interrupted." if stuck else _cause(text)
        return f"{died}: {cause}{_reward_at(crash)}{tail(path)}"


def named_class(actor: type, name: str) -> type:
    """Return the actor's class, named like the actor.

    Ray shows the class's name instead of the actor's in process titles of asynchronous actors and in prefixes of
    output.
    """
    return type(name, (actor,), {"__module__": actor.__module__, "__doc__": actor.__doc__})


def tail(path: Path) -> str:
    """Return where a log is and its last lines, or a crash's first lines, for an error message; '' without a log."""
    lines = _lines(path)
    if not lines:
        return ""
    shown = _crash(lines)[:TAIL_LINES] or lines[-TAIL_LINES:]
    return f"\nits log is {path}, which ends:\n" + "\n".join(f"  {line[:LINE_CHARACTERS]}" for line in shown)


def _lines(path: Path) -> list[str]:
    """Return the last lines of a log that the actor's last process has written; none without a log."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    # Earlier processes wrote into the same file.
    return lines[max((i for i, line in enumerate(lines) if STARTS in line), default=0) :]


def _crash(lines: list[str]) -> list[str]:
    """Return the lines from a crash's report on; [] without one."""
    return lines[next((i for i, line in enumerate(lines) if line.startswith((CRASH, STUCK))), len(lines)) :]


def _reward_at(crash: list[str]) -> str:
    """Return where in a reward a scorer was when it crashed, or was stuck, in words; '' if the report does not tell."""
    inner = None
    for frame in filter(None, map(_FRAME.match, crash)):
        if frame[1].endswith(_CALLER):
            return "" if inner is None else f" It was in {inner[3]}, {inner[1]}:{inner[2]}."
        inner = frame
    return ""


def _field(text: str, key: str) -> str:
    found = re.search(rf"^\s*{key}: (\S+)\s*$", text, re.MULTILINE)
    return found[1] if found else ""


_ADVICE = re.compile(r"\s*(?:Some common causes include|There are some potential root causes).*")
_NO_CAUSE = "Worker unexpectedly exits with a connection error code 2. End of file."
"""What Ray knows of a process that was killed, or that has crashed: its connection was closed."""


def _cause(text: str) -> str:
    """Return Ray's message without the fields that `explain` has already used, and without its guesses."""
    known = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:", "The actor died unexpectedly")
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(known)]
    said = _ADVICE.sub("", "\n".join(lines).strip() or text)
    return said.replace(_NO_CAUSE, "it was killed (SIGKILL, by hand or for lack of memory), or it crashed.")

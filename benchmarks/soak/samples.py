"""Looks at a run from outside, through /proc and its folders: memory, open files and threads of each process, and its files.

Invariants:
* it asks no process of the run for anything, so looking changes nothing but the load of the machine;
* memory is what is resident without what is shared (RssAnon + RssFile): the object store is counted apart, once.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import command, family

TICKS = os.sysconf("SC_CLK_TCK")
YARDSTICK = 100_000
"""Numbers that are squared and added, in about five milliseconds."""
TAIL = 16384
"""Bytes at the end of a journal in which there is a whole line of a step."""
ROLES = (
    (r"launch\.py", "driver"),
    (r"core/src/ray/gcs/gcs_server", "GCS"),
    (r"core/src/ray/raylet/raylet", "raylet"),
    (r"runtime/recovery/reaper\.py", "reaper"),
    (r"^ray::((?:rollout-\d+|learner(?:-\d+)?|scorer))\b", r"\1"),
    (r"^ray::(\w*Agent)", r"\1"),
    (r"_private/log_monitor\.py", "log monitor"),
    (r"dashboard/dashboard\.py", "dashboard"),
    (r"_private/monitor\.py", "autoscaler"),
    (r"^ray::", "task worker"),
    (r"streams\.video\.decode", "decode"),
)
"""Pattern of a command line -> what the process is."""


@dataclass(frozen=True)
class Process:
    """Processes of one role. memory, cpu_s: of all of them; cpu_s counts from their start."""

    count: int
    memory: int
    files: int
    threads: int
    cpu_s: float


@dataclass(frozen=True)
class Sample:
    """What was there when `step` was the newest one.

    Attributes:
        busy_s: CPU seconds that the whole machine has spent, on this run or not.
        yardstick_s: how long a fixed piece of work took, which tells how fast the machine was.
        files: (number, bytes) of the files under run_root by kind.
        store: bytes pinned in the object store, and spilled from it, as the raylet last wrote down; None if it has not yet.
    """

    step: int
    processes: dict[str, Process]
    busy_s: float
    yardstick_s: float
    files: dict[str, tuple[int, int]]
    store: tuple[int, int] | None

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the run's processes have spent."""
        return sum(process.cpu_s for process in self.processes.values())


def look(driver: int, root: Path, step: int) -> Sample:
    """Look at the run of this driver's process."""
    lines = {pid: command(pid) for pid in family(driver)}
    return Sample(step, _processes(lines), _busy_s(), _yardstick_s(), files_by_kind(root), _store(lines))


def role(line: str) -> str:
    """What a process is, by its command line; '' for one that is starting and not told yet."""
    for pattern, name in ROLES:
        if found := re.search(pattern, line):
            return found.expand(name)
    return ""


def _processes(lines: dict[int, str]) -> dict[str, Process]:
    found: dict[str, Process] = {}
    for pid, line in lines.items():
        if not (name := role(line)):
            continue
        with contextlib.suppress(OSError, KeyError):  # it ended meanwhile
            here, before = _process(pid), found.get(name, Process(0, 0, 0, 0, 0.0))
            found[name] = Process(
                before.count + 1,
                before.memory + here.memory,
                before.files + here.files,
                before.threads + here.threads,
                before.cpu_s + here.cpu_s,
            )
    return found


def _process(pid: int) -> Process:
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    stat = (folder / "stat").read_text().rpartition(")")[2].split()
    memory = sum(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    cpu_s = (int(stat[11]) + int(stat[12])) / TICKS
    return Process(1, memory, len(list((folder / "fd").iterdir())), int(status["Threads"]), cpu_s)


def _busy_s() -> float:
    """Return the CPU seconds of the whole machine, but for those in which it was idle or waited for a disk."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def _yardstick_s() -> float:
    began = time.perf_counter()
    sum(number * number for number in range(YARDSTICK))
    return time.perf_counter() - began


def _store(lines: dict[int, str]) -> tuple[int, int] | None:
    """Read the state that Ray's raylet writes into its session's folder every ten seconds."""
    socket = next((m[1] for line in lines.values() if (m := re.search(r"--raylet_socket_name=(\S+)", line))), None)
    if socket is None:
        return None
    with contextlib.suppress(OSError):
        state = (Path(socket).parent.parent / "logs" / "debug_state.txt").read_text()
        pinned = re.search(r"^- pinned objects size: (\d+)", state, re.MULTILINE)
        spilled = re.search(r"^- num bytes currently spilled: (\d+)", state, re.MULTILINE)
        if pinned and spilled:
            return int(pinned[1]), int(spilled[1])
    return None


def files_by_kind(root: Path) -> dict[str, tuple[int, int]]:
    """Return (number, bytes) of the files under run_root by kind."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(OSError):  # deleted meanwhile
                size = path.stat().st_size
                kind = kind_of(path.relative_to(root))
                counts[kind] += 1
                sizes[kind] += size
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def kind_of(path: Path) -> str:
    """What a file below run_root is, by its path from there."""
    first = path.parts[0]
    if first == "stages":
        return "journals" if path.name.endswith(".steps.jsonl") else "manifests"
    if first.startswith("mlflow"):
        return "mlflow"
    if any(part.endswith((".partial", ".replaced")) for part in path.parts):
        return "being written"
    return first if len(path.parts) > 1 else "other"


def newest_step(journal: Path) -> int:
    """Return the newest step in a stage's journal; 0 without any."""
    try:
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return 0
    return max((int(step) for step in re.findall(r'^\{"step": (\d+), "kind": "step"', text, re.MULTILINE)), default=0)

"""Whether what was seen of a long run has grown, and whether its steps have become slower. Pure.

Memory, files, open files and threads are compared between the first steps after the warm-up and the last ones, each as the
median of its samples, as allocators breathe. What may grow is named: logs, journals, checkpoints that are kept, MLflow's
database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.soak.samples import Sample

WARM, SPAN = 200, 200
"""Steps that are not judged, and steps that are compared with as many at the end; fewer in a shorter run."""
GROWTH = 0.05
FLOOR = 8 * 2**20
"""Bytes that a process may grow by, however small it is."""
FEW = 4
"""Open files and threads that a process may have more than before."""
SLOWER = 1.05
FOREIGN = 0.1
"""CPU cores that others must take more of at the end, before slower steps may be their doing."""
MAY_GROW = ("logs", "journals", "checkpoints", "mlflow", "being written")
"""Kinds of files that may. Of checkpoints the bytes, as each names all groups that its weights have seen; not the number."""
TASKS = "task worker"
"""Processes that Ray starts and ends as it likes."""
MIB = 2**20


@dataclass(frozen=True)
class Windows:
    """The steps that are compared: (first, last) of each."""

    early: tuple[int, int]
    late: tuple[int, int]

    @classmethod
    def of(cls, steps: int) -> Windows:
        warm, span = min(WARM, steps // 3), min(SPAN, steps // 3)
        return cls((warm, warm + span), (steps - span, steps))

    def at(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Return the samples at the beginning of the early steps, and those at the end of the late ones: a quarter of each."""
        (first, last), (_, end) = self.early, self.late
        some = max(1, (last - first) // 4)
        return (
            [s for s in samples if first <= s.step <= first + some],
            [s for s in samples if end - some <= s.step <= end],
        )

    def within(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Return the samples within the early steps, and within the late ones."""
        return tuple([s for s in samples if a <= s.step <= b] for a, b in (self.early, self.late))  # type: ignore[return-value]


def report(samples: Sequence[Sample], step_s: dict[int, float], steps: int) -> dict[str, Any]:
    """Return what is reported, with `ok` and the reasons if it is not. step_s: wall seconds by step."""
    windows = Windows.of(steps)
    early, late = windows.at(samples)
    done = max(step_s, default=0)
    if done < steps or not early or not late:
        seen = f"{len(early)} samples at step {windows.early[0]}, {len(late)} at the end"
        return {"steps": done, "ok": False, "reasons": [f"{done} of {steps} steps, {seen}: nothing can be compared"]}
    reasons: list[str] = []
    notes: list[str] = []
    row = {
        "steps": done,
        "compared_steps": {"early": windows.early, "late": windows.late},
        "processes": _processes(early, late, reasons),
        "files": _files(early, late, reasons),
        "object_store": _store(early, late, samples, reasons),
        "step_time": _times(windows, samples, step_s, reasons, notes),
        "limits": {"growth": GROWTH, "floor_mib": FLOOR / MIB, "slower": SLOWER},
    }
    return row | {"ok": not reasons, "reasons": reasons, "notes": notes}


def _middle(samples: Sequence[Sample], value: Callable[[Sample], float | None]) -> float | None:
    found = [number for sample in samples if (number := value(sample)) is not None]
    return median(found) if found else None


def _of(samples: Sequence[Sample], name: str, what: str) -> float | None:
    """Return the median of a field of the processes of one role; None if there were none."""
    return _middle(samples, lambda s: getattr(s.processes[name], what) if name in s.processes else None)


def _processes(early: Sequence[Sample], late: Sequence[Sample], reasons: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    between = max(1, late[-1].step - early[0].step)
    for name in sorted({name for sample in (*early, *late) for name in sample.processes}):
        before, after = (_of(part, name, "memory") for part in (early, late))
        if before is None or after is None:
            if name != TASKS:
                reasons.append(f"{name}: it was not there {'at first' if before is None else 'at the end'}")
            continue
        grown = after - before
        rows[name] = {
            "mib_early": round(before / MIB, 1),
            "mib_late": round(after / MIB, 1),
            "growth_percent": round(100 * grown / before, 1),
            "kib_per_step": round(grown / 1024 / between, 2),
        }
        if grown > max(GROWTH * before, FLOOR):
            reasons.append(f"{name}: {before / MIB:.1f} -> {after / MIB:.1f} MiB ({100 * grown / before:.0f} %)")
        for what in ("count", "files", "threads"):
            first, last = (_of(part, name, what) or 0.0 for part in (early, late))
            rows[name] |= {f"{what}_early": first, f"{what}_late": last}
            if last > first + (0 if what == "count" and name != TASKS else FEW):
                reasons.append(f"{name}: {what} {first:g} -> {last:g}")
    return rows


def _files(early: Sequence[Sample], late: Sequence[Sample], reasons: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in sorted({kind for sample in (*early, *late) for kind in sample.files}):
        (count, size), (last_count, last_size) = (_held(part, kind) for part in (early, late))
        rows[kind] = {"number_early": count, "number_late": last_count, "bytes_early": size, "bytes_late": last_size}
        if kind not in MAY_GROW and (last_count > count or last_size > size):
            reasons.append(f"files of {kind}: {count:g} -> {last_count:g}, {size:,.0f} -> {last_size:,.0f} bytes")
        if kind == "checkpoints" and last_count > (1 + GROWTH) * count:
            reasons.append(f"files of checkpoints: {count:g} -> {last_count:g}: more are kept than before")
    return rows


def _held(samples: Sequence[Sample], kind: str) -> tuple[float, float]:
    """Return the medians of number and bytes of the files of one kind."""
    found = [sample.files.get(kind, (0, 0)) for sample in samples]
    return median(number for number, _ in found), median(size for _, size in found)


def _store(
    early: Sequence[Sample], late: Sequence[Sample], samples: Sequence[Sample], reasons: list[str]
) -> dict[str, Any]:
    before, after = (_middle(part, lambda sample: sample.store[0] if sample.store else None) for part in (early, late))
    spilled = max((sample.store[1] for sample in samples if sample.store), default=0)
    if before is not None and after is not None and after - before > max(GROWTH * before, FLOOR):
        reasons.append(f"object store: {before / MIB:.1f} -> {after / MIB:.1f} MiB are pinned")
    if spilled:
        reasons.append(f"object store: {spilled / MIB:.1f} MiB were spilled to disk")
    return {
        "pinned_mib_early": None if before is None else round(before / MIB, 2),
        "pinned_mib_late": None if after is None else round(after / MIB, 2),
        "spilled_mib": round(spilled / MIB, 2),
    }


def _times(
    windows: Windows, samples: Sequence[Sample], step_s: dict[int, float], reasons: list[str], notes: list[str]
) -> dict[str, Any]:
    """Compare the medians of wall time; beside them, the CPU time of a step, how fast the machine was, and what others took."""
    wall = [median(step_s[i] for i in step_s if a < i <= b) for a, b in (windows.early, windows.late)]
    parts = windows.within(samples)
    (cpu_early, foreign_early), (cpu_late, foreign_late) = (_spent(part, step_s) for part in parts)
    slow_early, slow_late = (_middle(part, lambda sample: sample.yardstick_s) for part in parts)
    ratio = wall[1] / wall[0]
    machine = slow_late / slow_early if slow_early and slow_late else None
    cpu_ratio = cpu_late / cpu_early if cpu_early and cpu_late is not None else None
    said = f"the last steps take {ratio:.3f} times as long as the early ones ({wall[0]:.3f} -> {wall[1]:.3f} s)"
    if ratio > SLOWER:
        # The run slows the yardstick, too: it excuses nothing unless others took more of the machine.
        more = (foreign_late or 0.0) - (foreign_early or 0.0)
        if machine is not None and ratio / machine <= SLOWER and more > FOREIGN:
            notes.append(
                f"{said}, but so does other work ({machine:.3f} times), and others took {more:.2f} cores more: not judged, "
                "measure on a quiet machine"
            )
        else:
            reasons.append(said)
    if cpu_ratio is not None and cpu_ratio > SLOWER:
        notes.append(
            f"a step costs {cpu_ratio:.3f} times as much CPU time at the end ({cpu_early:.3f} -> {cpu_late:.3f} s)"
        )
    return {
        "wall_s_early": round(wall[0], 4),
        "wall_s_late": round(wall[1], 4),
        "wall_ratio": round(ratio, 4),
        "cpu_s_early": _rounded(cpu_early),
        "cpu_s_late": _rounded(cpu_late),
        "cpu_ratio": _rounded(cpu_ratio),
        "machine_ratio": _rounded(machine),
        "foreign_cores_early": _rounded(foreign_early),
        "foreign_cores_late": _rounded(foreign_late),
        "cpu_ms_by_process": _by_process(*parts),
    }


def _by_process(early: Sequence[Sample], late: Sequence[Sample]) -> dict[str, list[float]]:
    """Return the CPU milliseconds of a step at first and at the end, of every process that was there all the time."""
    rows: dict[str, list[float]] = {}
    if any(len(part) < 2 or part[-1].step == part[0].step for part in (early, late)):
        return rows
    for part in (early, late):
        first, last = part[0], part[-1]
        for name in sorted(_lasting(early) & _lasting(late)):
            spent = last.processes[name].cpu_s - first.processes[name].cpu_s
            rows.setdefault(name, []).append(round(1e3 * spent / (last.step - first.step), 2))
    return rows


def _spent(part: Sequence[Sample], step_s: dict[int, float]) -> tuple[float | None, float | None]:
    """Return the CPU seconds of a step, of all processes that were there all the time, and the cores that others took."""
    if len(part) < 2 or part[-1].step == part[0].step:
        return None, None
    first, last = part[0], part[-1]
    cpu = sum(last.processes[name].cpu_s - first.processes[name].cpu_s for name in _lasting(part))
    wall = sum(step_s[i] for i in range(first.step + 1, last.step + 1) if i in step_s)
    foreign = (last.busy_s - first.busy_s - cpu) / wall if wall else None
    return cpu / (last.step - first.step), foreign


def _lasting(part: Sequence[Sample]) -> set[str]:
    return (part[0].processes.keys() & part[-1].processes.keys()) - {TASKS}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

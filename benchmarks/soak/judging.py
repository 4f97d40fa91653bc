"""Whether what was seen of a long run has grown, and whether its steps have become slower. Pure.

Memory, files, open files and threads are compared between the first steps after the warm-up and the last ones, each as the median
of its samples, as allocators breathe. What may grow is named: logs, journals, checkpoints that are kept, MLflow's database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.soak.samples import Sample

WARM, SPAN = 200, 200
"""Steps that are not judged, and steps that are compared with as many at the end; fewer in a run of under three times as many."""
GROWTH = 0.05
FLOOR = 8 * 2**20
"""Bytes that a process may grow by, however small it is."""
FEW = 4
"""Open files and threads that a process may have more than before."""
SLOWER = 1.05
FOREIGN = 0.1
"""CPU cores that others may take more of during the last steps before the run's wall time says little."""
MAY_GROW = ("logs", "journals", "checkpoints", "mlflow", "being written")
"""Kinds of files that may. Of checkpoints their bytes, as each names all groups that its weights have seen; not their number."""
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
        "processes": _processes(early, late, done, reasons),
        "files": _files(early, late, reasons),
        "object_store": _store(early, late, samples, reasons),
        "step_time": _times(windows, samples, step_s, reasons, notes),
        "limits": {"growth": GROWTH, "floor_mib": FLOOR / MIB, "slower": SLOWER},
    }
    return row | {"ok": not reasons, "reasons": reasons, "notes": notes}


def _middle(samples: Sequence[Sample], value: Callable[[Sample], float | None]) -> float | None:
    found = [number for sample in samples if (number := value(sample)) is not None]
    return median(found) if found else None


def _processes(early: Sequence[Sample], late: Sequence[Sample], steps: int, reasons: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    between = max(1, late[-1].step - early[0].step)
    for name in sorted({name for sample in (*early, *late) for name in sample.processes}):

        def of(what: str, name: str = name) -> tuple[float | None, float | None]:
            def value(sample: Sample) -> float | None:
                return getattr(sample.processes[name], what) if name in sample.processes else None

            return _middle(early, value), _middle(late, value)

        before, after = of("memory")
        if before is None or after is None:
            if name != "task worker":  # Ray starts and ends those as it likes
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
            first, last = of(what)
            assert first is not None and last is not None
            rows[name] |= {f"{what}_early": first, f"{what}_late": last}
            if last > first + (0 if what == "count" and name != "task worker" else FEW):
                reasons.append(f"{name}: {what} {first:g} -> {last:g}")
    return rows


def _files(early: Sequence[Sample], late: Sequence[Sample], reasons: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in sorted({kind for sample in (*early, *late) for kind in sample.files}):
        counts = [_middle(samples, lambda sample: sample.files.get(kind, (0, 0))[0]) for samples in (early, late)]
        sizes = [_middle(samples, lambda sample: sample.files.get(kind, (0, 0))[1]) for samples in (early, late)]
        rows[kind] = {
            "number_early": counts[0],
            "number_late": counts[1],
            "bytes_early": sizes[0],
            "bytes_late": sizes[1],
        }
        if kind not in MAY_GROW and (counts[1] > counts[0] or sizes[1] > sizes[0]):
            reasons.append(f"files of {kind}: {counts[0]} -> {counts[1]}, {sizes[0]:,} -> {sizes[1]:,} bytes")
        if kind == "checkpoints" and counts[1] > (1 + GROWTH) * counts[0]:
            reasons.append(f"files of checkpoints: {counts[0]} -> {counts[1]}: more are kept than before")
    return rows


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
    """Compare the medians of wall time, and what CPU time a step has cost the run and others took meanwhile."""
    wall = [median(step_s[i] for i in step_s if a < i <= b) for a, b in (windows.early, windows.late)]
    spent = [_spent(part, step_s) for part in windows.within(samples)]
    (cpu_early, foreign_early), (cpu_late, foreign_late) = spent
    ratio = wall[1] / wall[0]
    cpu_ratio = cpu_late / cpu_early if cpu_early and cpu_late is not None else None
    said = f"the last steps take {ratio:.3f} times as long as the early ones ({wall[0]:.3f} -> {wall[1]:.3f} s)"
    if ratio > SLOWER:
        more = None if foreign_early is None or foreign_late is None else foreign_late - foreign_early
        if more is not None and more > FOREIGN and cpu_ratio is not None and cpu_ratio <= SLOWER:
            notes.append(
                f"{said}, but others took {more:.2f} cores more of the machine meanwhile, and a step costs the run "
                f"{cpu_ratio:.3f} times as much CPU time: not judged, measure again on a quiet machine"
            )
        else:
            reasons.append(said)
    if cpu_ratio is not None and cpu_ratio > SLOWER:
        notes.append(f"a step costs {cpu_ratio:.3f} times as much CPU time at the end ({cpu_early:.3f} -> {cpu_late:.3f} s)")
    return {
        "wall_s_early": round(wall[0], 4),
        "wall_s_late": round(wall[1], 4),
        "wall_ratio": round(ratio, 4),
        "cpu_s_early": _rounded(cpu_early),
        "cpu_s_late": _rounded(cpu_late),
        "cpu_ratio": _rounded(cpu_ratio),
        "foreign_cores_early": _rounded(foreign_early),
        "foreign_cores_late": _rounded(foreign_late),
    }


def _spent(part: Sequence[Sample], step_s: dict[int, float]) -> tuple[float | None, float | None]:
    """Return the CPU seconds of a step, of all processes that were there all the time, and the cores that others took."""
    if len(part) < 2 or part[-1].step == part[0].step:
        return None, None
    first, last = part[0], part[-1]
    both = first.processes.keys() & last.processes.keys() - {"task worker"}
    cpu = sum(last.processes[name].cpu_s - first.processes[name].cpu_s for name in both)
    wall = sum(step_s[i] for i in range(first.step + 1, last.step + 1) if i in step_s)
    foreign = (last.busy_s - first.busy_s - cpu) / wall if wall else None
    return cpu / (last.step - first.step), foreign


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

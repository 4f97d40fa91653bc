"""Where the time and memory of a run's actors went, beside the estimates made before they loaded anything.

It writes one file, `run_root/usage.json`. On a GPU, memory is torch's own exact count. On a CPU it is how much the
process has grown, libraries loaded meanwhile included.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from runtime.planning.device_plan import DevicePlan
from runtime.planning.footprint import Footprint, gib
from streams.log.mismatch import LogpDiff
from streams.support.files import write_json
from streams.support.usage import ProcessUsage

USAGE_FILE = "usage.json"


def usage_report(usage: list[ProcessUsage | None], plan: DevicePlan, by_kind: dict[str, LogpDiff]) -> dict[str, Any]:
    """Return the report. by_kind: mismatch by kind of token.

    usage: processes in the order of the plan's devices, None for one that is not there, or died with its account; workers that
    joined after the plan was made come last.
    """
    processes = {}
    for process, device in zip_longest(usage, plan.devices, fillvalue=None):
        if process is None:
            continue
        held, name = (device.held, device.name) if device else (0, "the device of a worker that joined late")
        # Subtract what the process held before it loaded anything, so that peaks compare with the estimate.
        phases = {name: replace(phase, peak=max(0, phase.peak - held)) for name, phase in process.phases.items()}
        peak = max((phase.peak for phase in phases.values()), default=0)
        estimate = _estimate(process.process, plan.footprints)
        processes[process.process] = {
            "device": name,
            "estimated_bytes": estimate,
            "peak_bytes": peak,
            "peak_over_estimate": peak / estimate if estimate else None,
            "compiles": process.compiles,
            "phases": {name: asdict(phase) for name, phase in phases.items()},
        }
    return {"processes": processes, "mismatch_by_kind": {kind: asdict(diff) for kind, diff in sorted(by_kind.items())}}


def usage_lines(report: dict[str, Any]) -> list[str]:
    """Return the report in words, one line for each process and one for the mismatch."""
    lines = []
    for name, process in report["processes"].items():
        phases = ", ".join(
            f"{phase} {spent['seconds']:.1f} s" + (f" ({gib(spent['peak'])})" if spent["peak"] else "")
            for phase, spent in process["phases"].items()
        )
        estimate = process["estimated_bytes"]
        beside = f"; peak {gib(process['peak_bytes'])}, estimated {gib(estimate)}" if estimate else ""
        compiles = f"; {process['compiles']} kernels compiled" if process["compiles"] else ""
        lines.append(f"usage: {name}: {phases}{beside}{compiles}")
    kinds = {kind: diff for kind, diff in report["mismatch_by_kind"].items() if diff["tokens"]}
    if kinds:
        shown = ", ".join(
            f"{kind} mean {diff['mean']:.1e} max {diff['max']:.1e} k3 {diff['k3']:.1e} ({diff['tokens']} tokens)"
            for kind, diff in kinds.items()
        )
        lines.append(f"mismatch of learner and engine on the published weights: {shown}")
    return lines


def write_usage(root: Path, stage: str, report: dict[str, Any]) -> Path:
    """Add a stage's report to run_root/usage.json."""
    path = root / USAGE_FILE
    stages = _read(path) | {stage: report}
    write_json(path, stages)
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _estimate(process: str, footprints: tuple[Footprint, ...]) -> int | None:
    """Return the estimate for a process (`rollout worker` is that of `rollout worker 1`); None if there is none."""
    return next((f.total for f in footprints if process.startswith(f.process)), None)

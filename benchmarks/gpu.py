"""Everything that needs a GPU, run and recorded, within the minutes that a borrowed machine gives.

    python -m benchmarks.gpu [NAME...] [KEY=VALUE...] [--seconds N] [--quick]

    python -m benchmarks.gpu                                        all of it, within twelve minutes
    python -m benchmarks.gpu smoke learner.offload=cpu              one part; KEY=VALUE go to the smoke run
    python -m benchmarks.gpu smoke tests --seconds 570              on a machine that ends a command after ten minutes

Names, in the order of what they tell: smoke tests rollout attention. Each writes benchmarks/results/gpu_<name>.json with the
hardware and the versions as soon as there is anything to write, and again with everything that comes. A part has its share of
the seconds at most, and leaves to those after it what they need at least; one that is left out or cut off says so in its file.
Without a CUDA device it says so and exits 2; it exits 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, ROOT, write_result
from benchmarks.parts import INTERRUPT_S, run_part
from benchmarks.smoke import COLOCATED, run_smoke

SECONDS = 720.0
TO_WRITE_S = 10.0
"""Of all seconds, kept for the last result."""
OUTCOME = re.compile(r"^(tests/\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")


@dataclass(frozen=True)
class Visit:
    """What was asked for. overrides: of the smoke run's configuration."""

    overrides: tuple[str, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class Part:
    """run: (result file, seconds, what was asked for) -> passed. share: of all seconds, at most. least_s: less is in vain."""

    run: Callable[[Path, float, Visit], bool]
    share: float
    least_s: float


def run_tests(path: Path, limit_s: float, visit: Visit) -> bool:
    """Run `pytest -m cuda` and write every outcome when it comes: counts, and how every failure reads."""
    outcomes: dict[str, str] = {}
    notes: list[str] = []

    def measured() -> dict[str, Any]:
        words = [word.lower() for word in outcomes.values()]
        counts = {word: words.count(word) for word in ("passed", "failed", "error", "skipped") if word in words}
        return {"passed": False, "complete": False, "counts": counts, "notes": notes, "outcomes": outcomes}

    def on_line(line: str) -> None:
        if found := OUTCOME.match(line):
            outcomes[found[1]] = found[2]
            write_result(path, measured())
        elif line.startswith(("FAILED", "ERROR", "SKIPPED")):
            notes.append(line)

    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "-rfEs", "--tb=short", "tests"]
    done = run_part(command, ROOT, limit_s, on_line)
    found = measured() | {"complete": not done.cut_off, "cut_off": done.cut_off, "seconds": done.seconds}
    found["passed"] = done.status == 0 and not done.cut_off and found["counts"].get("passed", 0) > 0
    write_result(path, found)
    return bool(found["passed"])


def run_benchmark(module: str, *more: str) -> Callable[[Path, float, Visit], bool]:
    """Return a part that runs `python -m benchmarks.MODULE`, which itself writes its rows as they come. more: arguments."""

    def run(path: Path, limit_s: float, visit: Visit) -> bool:
        # Rows of an earlier visit must not be taken for this one's.
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cuda", "--json", str(path), *more]
        quick = ["--quick"] if visit.quick and "--quick" not in more else []
        done = run_part([*command, *quick], ROOT, limit_s)
        passed = done.status == 0 and not done.cut_off
        if not passed:
            kept = json.loads(path.read_text()) if path.is_file() else {}
            ended = {"status": done.status, "cut_off": done.cut_off, "error": list(done.last)}
            write_result(path, kept | {"passed": False, "seconds": done.seconds, **ended})
        return passed

    return run


def _smoke(path: Path, limit_s: float, visit: Visit) -> bool:
    return run_smoke(path, (COLOCATED, *visit.overrides), limit_s=limit_s)


PARTS: dict[str, Part] = {
    "smoke": Part(_smoke, share=0.6, least_s=120.0),
    "tests": Part(run_tests, share=0.5, least_s=60.0),
    "rollout": Part(run_benchmark("rollout", "--preset", "qwen2.5-vl-3b", "--quick"), share=0.35, least_s=45.0),
    "attention": Part(run_benchmark("attention"), share=0.25, least_s=30.0),
}


def visit_gpu(names: list[str], seconds: float, visit: Visit, parts: dict[str, Part], results: Path) -> bool:
    """Run the named parts one after the other within `seconds`; returns whether all passed."""
    ends = time.monotonic() + seconds - TO_WRITE_S
    passed = []
    for number, name in enumerate(names):
        part, path = parts[name], results / f"gpu_{name}.json"
        # What the later ones need at least is theirs.
        later = sum(parts[other].least_s + INTERRUPT_S for other in names[number + 1 :])
        limit = min(part.share * seconds, ends - time.monotonic() - later) - INTERRUPT_S
        if limit < part.least_s:
            note = f"left out: {max(0.0, limit):.0f} s left, it needs {part.least_s:.0f}"
            print(f"benchmarks.gpu: {name}: {note}", flush=True)
            write_result(path, {"passed": False, "complete": False, "note": note})
            passed.append(False)
            continue
        print(f"benchmarks.gpu: {name}: at most {limit:.0f} s, into {path}", flush=True)
        passed.append(part.run(path, limit, visit))
        print(f"benchmarks.gpu: {name}: {'passed' if passed[-1] else 'FAILED'}", flush=True)
    return all(passed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="NAME|KEY=VALUE", help="parts, and settings of the smoke run")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="until everything is over (default: %(default)g)"
    )
    parser.add_argument("--quick", action="store_true", help="the quick form of the benchmarks that have one")
    options = parser.parse_intermixed_args(arguments)
    names = [word for word in options.words if "=" not in word]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"benchmarks.gpu: {unknown[0]!r} is not one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    overrides = tuple(word for word in options.words if "=" in word)
    if overrides and names and "smoke" not in names:
        print(f"benchmarks.gpu: {overrides[0]} is for the smoke run, which is not asked for", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks.gpu: this machine has no CUDA device, nothing was measured", file=sys.stderr)
        return 2
    asked = Visit(overrides, options.quick)
    return 0 if visit_gpu(names or list(PARTS), options.seconds, asked, PARTS, RESULTS) else 1


if __name__ == "__main__":
    # `timeout` ends a command so: the part that runs is then interrupted and ended, as when it is out of time.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))

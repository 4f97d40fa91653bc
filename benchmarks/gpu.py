"""Everything that needs a GPU, run and recorded.

    python -m benchmarks.gpu [NAME...]      names: tests attention smoke (default: all)

Each writes benchmarks/results/gpu_<name>.json with the hardware and the versions. Without a CUDA device it says so and
exits 2; it exits 1 if a part failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, ROOT, write_result
from benchmarks.smoke import run_smoke


def run_tests(path: Path) -> bool:
    """`pytest -m cuda`: how many passed, failed and were skipped, and how every failure reads."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-rfEs", "--tb=short", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n")
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error)", line)), "")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    passed = done.returncode == 0 and counts.get("passed", 0) > 0
    notes = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    seconds = round(time.monotonic() - began, 1)
    write_result(path, {"passed": passed, "counts": counts, "notes": notes, "seconds": seconds})
    return passed


def run_attention(path: Path) -> bool:
    command = [sys.executable, "-m", "benchmarks.attention", "--device", "cuda", "--json", str(path)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


PARTS: dict[str, Callable[[Path], bool]] = {"tests": run_tests, "attention": run_attention, "smoke": run_smoke}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PARTS)} (default: all)")
    names = parser.parse_args(arguments).names
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("benchmarks.gpu: this machine has no CUDA device, nothing was measured", file=sys.stderr)
        return 2
    passed = [PARTS[name](RESULTS / f"gpu_{name}.json") for name in names or PARTS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

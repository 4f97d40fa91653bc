"""Reads a task file of many rows: how long does it take, and how much memory does a row need?

    python -m benchmarks.soak.rows [--rows N] [--json PATH|-]

The file is read as a run reads it, in a process of its own, once with a fifth of the rows and once with all. Exit 1 says that
more rows than a fifth took more than LIMIT bytes of memory each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import result_target, write_result
from streams.data.dataset import load_tasks
from tests.support.project import ROOT

LIMIT = 200
LIMIT_S = 1800.0
FEWEST = 1_000_000


def write(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            row = {
                "id": f"clip-{i:07d}",
                "video": f"clips/{i // 4:06d}.mp4",
                "start": 0,
                "end": 60,
                "queries": [{"time": 2.0, "text": f"what happens at {i}?"}],
                "answers": [{"time": 4.0, "text": "a red door opens"}],
            }
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a file in this process."""
    began = time.perf_counter()
    found = load_tasks(path)
    seconds = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": len(found.tasks), "seconds": round(seconds, 1), "peak_mib": round(peak / 2**20, 1)}


def measured(folder: Path, rows: int) -> dict[str, Any]:
    """Read so many rows in a process of its own."""
    path = folder / f"{rows}.jsonl"
    write(path, rows)
    command = [sys.executable, "-m", "benchmarks.soak.rows", "--read", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak.rows")
    parser.add_argument("--rows", type=int, default=FEWEST)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=result_target, default="-", help="file to write, - for the terminal")
    options = parser.parse_args(arguments)
    if options.read:
        print(json.dumps(read(options.read)))
        return 0
    if options.rows < FEWEST:
        parser.error(f"--rows {options.rows} must be at least {FEWEST:,}: with fewer, what is bounded is not full yet")
    with tempfile.TemporaryDirectory() as folder:
        few, all_ = (measured(Path(folder), rows) for rows in (options.rows // 5, options.rows))
    grown = 2**20 * (all_["peak_mib"] - few["peak_mib"]) / (all_["rows"] - few["rows"])
    row = {"few": few, "all": all_, "bytes_per_row": round(grown, 1), "limit": LIMIT, "ok": grown <= LIMIT}
    if options.json == "-":
        print(json.dumps(row))
    else:
        write_result(Path(options.json), row)
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

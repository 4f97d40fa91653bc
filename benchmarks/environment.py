"""What a measurement was made on: hardware and versions, for the files in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from streams.support.files import write_atomic
from streams.support.paths import user_path

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "flashinfer-python", "flash-attn", "triton", "av", "decord2")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASK_S = 120.0
"""How long a process may take to say what hardware there is: it imports torch."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of those `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the number of CPU cores, and the GPU with its memory and driver if there is one."""
    import torch

    found: dict[str, Any] = {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpus"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def in_words() -> str:
    """Return hardware and versions as one line, for the head of a table."""
    where = hardware()
    gpu = f"{where['gpu']}, {where['gpu_memory_gib']} GiB" if where["gpu"] else "no GPU"
    listed = dict(versions())
    python = listed.pop("python")
    packages = ", ".join(f"{name} {number}" for name, number in listed.items())
    return f"{where['cpu_cores']} CPU cores ({where['machine']}), {gpu}; Python {python}; {packages}"


def result_target(text: str) -> str:
    """Check the value of --json (an argparse type), so that a file that cannot be written fails before any measurement.

    "" and "-" are no file.
    """
    if text in ("", "-"):
        return text
    path = user_path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written ({error.strerror}): name another file") from error
    return str(path)


def write_result(path: Path, measured: dict[str, Any]) -> None:
    """Write `measured`, with the hardware and versions it was measured on, as JSON; the file is the old one or the new one."""
    whole = {"hardware": hardware_apart(), "versions": versions(), **measured}
    write_atomic(path, json.dumps(whole, indent=2) + "\n")


@cache
def hardware_apart() -> dict[str, Any]:
    """Return `hardware()`, asked once and in a process of its own unless this one uses CUDA already.

    Half a gigabyte of the card would be this process's until its end, beside a run that needs all of it.
    """
    import torch

    if torch.cuda.is_initialized() or not torch.cuda.is_available():
        return hardware()
    code = "import json; from benchmarks.environment import hardware; print(json.dumps(hardware()))"
    asked = [sys.executable, "-c", code]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=ASK_S, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

"""What a measurement was made on: hardware and versions, for the files in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from streams.support.paths import user_path

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "flashinfer-python", "flash-attn", "triton", "av", "decord2")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
    """Write `measured`, with the hardware and versions it was measured on, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"hardware": hardware(), "versions": versions(), **measured}
    path.write_text(json.dumps(whole, indent=2) + "\n")

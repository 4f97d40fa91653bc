"""The project's wheel, and a fresh virtual environment that has it installed and does not see the repository.

The third-party packages come from the environment that runs the tests, by a path in a `.pth` file. Python does not read the
`.pth` files of a folder that is added this way, so an editable install there has no effect.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.support.project import ROOT

_COMMAND = "#!{python}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the repository with pip. Needs hatchling: from the `dev` extra, else pip fetches it from the index."""
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder), "platbase": str(self.folder)}))

    def run(self, *words: str, cwd: Path, limit_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run one of its commands, without the tests' PYTHONPATH."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
        command = [str(self.bin / words[0]), *words[1:]]
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=limit_s)


def install(wheel: Path, folder: Path) -> Installed:
    """Make a fresh environment with the wheel and a `ray` command; the wheel is installed before it sees other packages."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    made = Installed(folder)
    python = str(made.bin / "python")
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel))
    (made.site_packages / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ray = made.bin / "ray"
    ray.write_text(_COMMAND.format(python=python, module="ray.scripts.scripts"))
    shutil.copymode(made.bin / "sightline", ray)
    return made


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

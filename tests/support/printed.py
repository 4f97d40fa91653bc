"""What a module of `tests.support` prints in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.project import ROOT


def lines(module: str, **environment: str) -> list[str]:
    """Run the module and return its lines; Triton interprets there only if `environment` says so."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    ran = subprocess.run([sys.executable, "-m", module], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()

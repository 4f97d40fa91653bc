"""What the tests with real processes share."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock

from tests.support.killed_runs import DETERMINISTIC, LIMIT_S, Driver


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run_root of a deterministic run that nobody disturbed: one for all processes that test."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # theirs are in there
    root = folder / "undisturbed"
    with FileLock(f"{root}.lock", timeout=LIMIT_S):
        if not (root / "checkpoints" / "rl" / "final").exists():
            driver = Driver(root, *DETERMINISTIC)
            assert driver.wait() == 0, driver.output
    return root

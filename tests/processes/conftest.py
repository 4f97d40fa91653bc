"""What the tests of killed runs compare with."""

from __future__ import annotations

import pytest

from tests.support.killed_runs import DETERMINISTIC, Driver


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run_root of a deterministic run that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    driver = Driver(root, *DETERMINISTIC)
    assert driver.wait() == 0, driver.output
    return root

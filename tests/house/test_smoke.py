"""`make check` says something about every package."""

from __future__ import annotations

import pytest

from tests.support.project import ROOT

pytestmark = pytest.mark.smoke

PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
FOLDERS = {"sightline": "packaging"}
"""Where the tests of a package are, if not in a folder of its name."""


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_claim_in_the_smoke_tier(package):
    folder = ROOT / "tests" / FOLDERS.get(package, package)
    tests = folder.glob("test_*.py")
    assert any("pytest.mark.smoke" in path.read_text() for path in tests), f"mark a quick test in {folder}"

"""`make check` says something about every package."""

from __future__ import annotations

import pytest

from tests.support.project import ROOT

pytestmark = pytest.mark.smoke

# The wheel's own package is tested in tests/packaging, which builds one.
PACKAGES = sorted(
    path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "sightline")
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_claim_in_the_smoke_tier(package):
    tests = (ROOT / "tests" / package).glob("test_*.py")
    assert any("pytest.mark.smoke" in path.read_text() for path in tests), f"mark a quick test in tests/{package}"

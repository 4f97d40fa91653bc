"""Who may import whom outside the packages: tests share through tests/support, and nothing that runs knows its tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.project import ROOT

pytestmark = pytest.mark.smoke

PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests",))
PRODUCTION = [name for name in PACKAGES if name != "benchmarks"]


def imported(source: str, package: str = "") -> Iterator[str]:
    """Yield the full dotted name of everything imported anywhere in `source`, a module of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def found(folder: str, wrong) -> list[str]:
    """'FILE imports NAME' for every import of a module under `folder` for which `wrong(NAME)` holds."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported(path.read_text(), package_of(path))
        if wrong(name)
    ]


def of_a_test(name: str) -> bool:
    return any(part.startswith("test_") for part in name.split(".")[:-1]) or (
        name.startswith("tests.") and name.split(".")[-1].startswith("test_")
    )


def of_the_workshop(name: str) -> bool:
    return name.split(".")[0] in ("tests", "benchmarks")


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_test_is_imported(folder):
    assert found(folder, of_a_test) == [], "what several tests need belongs in tests/support or a conftest.py"


@pytest.mark.parametrize("folder", PRODUCTION)
def test_what_runs_knows_neither_tests_nor_benchmarks(folder):
    assert found(folder, of_the_workshop) == []


def test_nor_does_the_command():
    assert not [name for name in imported((ROOT / "launch.py").read_text()) if of_the_workshop(name)]


def test_every_package_is_looked_at():
    assert {"streams", "rollout", "learner", "rewards", "conf", "runtime", "sft", "evals", "rl"} <= set(PRODUCTION)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from tests.conf.test_config import composed", True),
        ("from tests.streams import test_exactness as exactness", True),
        ("def f():\n    import tests.conf.test_config", True),
        ("from ..conf import test_config", True),
        ("from .test_run import launch", True),
        ("from tests.support.configs import composed", False),
        ("from rewards.correctness import test_words", False),
    ],
)
def test_such_an_import_is_found_however_it_is_written(source, wrong):
    assert any(of_a_test(name) for name in imported(source, "tests.processes")) == wrong

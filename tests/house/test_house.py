"""The limits that keep the house readable, on every file of production code and of the benchmarks.

A limit that is passed means: give the thing a room of its own. Each table of exceptions names what is above the limit today and
why; what no longer needs its exception fails here, too, so the tables only shrink.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("streams", "rollout", "learner", "rewards", "conf", "runtime", "sft", "evals", "rl", "benchmarks")
FILES = (ROOT / "launch.py", *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))))

MODULES, METHODS, ATTRIBUTES, LINES, FUNCTION = 12, 15, 15, 500, 80

FULL_FOLDERS: dict[str, str] = {}
"""Folder -> why it has more than MODULES modules."""
MANY_METHODS = {
    "Backbone": "one adapter to transformers: half of them are one-line properties of the loaded model",
    "Layout": "every way between words and ids, so that nothing else ever tokenises",
    "StageStore": "a decision table: each method answers one question about a stage on disk",
}
"""Class -> why it has more than METHODS methods."""
MANY_ATTRIBUTES = {
    "RLResult": "a row of counters, each a field of a checkpoint's JSON",
    "Run": "to be split: what the stages share becomes one object",
}
"""Class -> why it has more than ATTRIBUTES attributes."""


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield node.name, node


def methods(node: ast.ClassDef) -> int:
    return sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)


def attributes(node: ast.ClassDef) -> set[str]:
    """What the methods assign to self, and the fields of a dataclass that is not frozen: a frozen one is a row of values."""
    found = {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
        if isinstance(target.value, ast.Name) and target.value.id == "self"
    }
    if not any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list):
        found |= {i.target.id for i in node.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)}
    return found


def largest(count: Callable[[ast.ClassDef], int]) -> dict[str, int]:
    """By class; of several with one name, the largest counts."""
    found: dict[str, int] = {}
    for name, node in classes():
        found[name] = max(found.get(name, 0), count(node))
    return found


def above(sizes: dict[str, int], limit: int, excepted: dict[str, str]) -> dict[str, int | str]:
    """What is above the limit without an exception, and what has an exception that it does not need."""
    found: dict[str, int | str] = {name: size for name, size in sizes.items() if size > limit and name not in excepted}
    return found | {name: "needs no exception" for name in excepted if sizes.get(name, 0) <= limit}


def test_a_folder_holds_at_most_12_modules():
    sizes: dict[str, int] = {}
    for path in FILES:
        if path.name != "__init__.py":
            folder = str(path.parent.relative_to(ROOT))
            sizes[folder] = sizes.get(folder, 0) + 1
    assert above(sizes, MODULES, FULL_FOLDERS) == {}


def test_a_class_has_at_most_15_methods():
    assert above(largest(methods), METHODS, MANY_METHODS) == {}


def test_a_class_has_at_most_15_attributes():
    assert above(largest(lambda node: len(attributes(node))), ATTRIBUTES, MANY_ATTRIBUTES) == {}


def test_a_file_has_at_most_500_lines():
    paths = (*FILES, *(ROOT / "tests").rglob("*.py"))
    assert {str(path.relative_to(ROOT)): n for path in paths if (n := len(path.read_text().splitlines())) > LINES} == {}


def test_a_function_has_at_most_80_lines():
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION:
                    found[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert found == {}


WALL_CLOCK = {"runtime/tracking/tracker.py": "once, as the process starts: MLflow labels charts with the time of day"}
"""Module -> why it asks for the time of day, which may jump: durations and deadlines are measured by time.monotonic."""


def asks_the_wall_clock(source: str) -> bool:
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return bool(called & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"})


def test_no_duration_depends_on_a_clock_that_may_be_set():
    found = {str(path.relative_to(ROOT)) for path in FILES if asks_the_wall_clock(path.read_text())}
    assert found == set(WALL_CLOCK)
    assert asks_the_wall_clock("began = time.time()")
    assert not asks_the_wall_clock("began = time.monotonic()")


def test_the_counts_see_what_they_are_for():
    """A class as it would be written, one above both limits, and a function in a folder that is too full."""
    lines = "\n".join(f"    def f{i}(self):\n        self.a{i}, self.b.c = {i}, 1" for i in range(16))
    (node,) = ast.parse(f"class Hall:\n    x: int = 0\n{lines}").body
    assert isinstance(node, ast.ClassDef)
    assert methods(node) == 16 > METHODS
    assert attributes(node) == {f"a{i}" for i in range(16)} | {"x"}
    assert above({"a": 16, "b": 15}, 15, {}) == {"a": 16}
    assert above({"a": 16, "b": 15}, 15, {"a": "why", "b": "why"}) == {"b": "needs no exception"}

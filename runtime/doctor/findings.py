"""What a check has found: a line for each, and whether a run would start.

Invariants:
* a check that fails keeps no other from running, but for those that need what it makes;
* what a check says while it runs is told below its line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ray.exceptions import RayError

from runtime.tracking.progress import Progress
from streams.support.terminal import visible

T = TypeVar("T")
OK, WARNING, PROBLEM, OPEN = "ok", "warning", "problem", "not checked"
WIDTH = len(OPEN)


class Heard(Progress):
    """Keeps what is said, instead of printing it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@dataclass
class Findings:
    """problems: what keeps a run from starting."""

    problems: list[str] = field(default_factory=list)
    heard: Heard = field(default_factory=Heard)

    def check(self, what: str, ask: Callable[[], T], told: Callable[[T], str] = str) -> T | None:
        """Run a check, and print its line: what `told` makes of its value. Returns the value, None if it failed."""
        try:
            value = ask()
            line = told(value)
        except (ValueError, OSError, RuntimeError, RayError) as error:
            self._fail(what, error)
            return None
        said = self.heard.take()
        warned = any("warning: " in text for text in (line, *said))
        self._print(WARNING if warned else OK, what, line.removeprefix("warning: ").removeprefix(f"{what}: "), said)
        return value

    def leave_open(self, what: str, why: str) -> None:
        """Say that something was not checked."""
        self._print(OPEN, what, why, self.heard.take())

    def _fail(self, what: str, error: Exception) -> None:
        said = self.heard.take()
        # A preflight lists all that it has found.
        for problem in getattr(error, "problems", None) or [str(getattr(error, "cause", None) or error).strip()]:
            self.problems.append(f"{what}: {problem}")
            self._print(PROBLEM, what, problem, said)
            said = []

    def _print(self, mark: str, what: str, line: str, said: list[str]) -> None:
        text = visible(line).replace("\n", "\n" + " " * (WIDTH + 4))
        print(f"{mark:<{WIDTH}}  {what}: {text}", flush=True)
        for more in said:
            print(f"{'':<{WIDTH}}    {visible(more)}", flush=True)

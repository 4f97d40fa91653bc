"""The steps of a stage, one JSON line each, in `run_root/stages/<stage>.steps.jsonl`.

Invariants:
* a line is written when its step happens;
* a resumed stage rewinds the file to its checkpoint's step, so the file has one history;
* the tracker takes lines only up to a checkpoint's step, so a step that a crash undoes was never in the charts;
* lines that were written and taken are in the file only: what a stage holds in memory does not grow with its steps.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.support.strict_json import dumps

log = logging.getLogger("sightline.journal")


@dataclass(frozen=True)
class JournalLine:
    """One step, or one evaluation during training (`kind` "eval"). groups: what the step trained."""

    step: int
    kind: str
    values: dict[str, float | None]
    groups: tuple[str, ...] = ()


class StepJournal:
    """Appends lines; `take(step)` hands out those up to a step that were not taken yet."""

    def __init__(self, path: Path, lines: list[JournalLine]) -> None:
        """lines: what the file begins with; it is written anew."""
        self.path = path
        self._waiting = lines
        self._missing: list[JournalLine] = []
        self._evaluated = {line.step: line.values for line in lines if line.kind == "eval"}
        text = "".join(map(_dumps, lines)).encode()
        self._replace(text)
        self._written = len(text)

    @classmethod
    def open(cls, path: Path, step: int) -> StepJournal:
        """Return the journal that a stage at `step` continues: later lines, and a torn last one, are cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, [line for line in read_lines(path) if line.step <= step] if step else [])

    def append(
        self, step: int, values: dict[str, float | None], groups: tuple[str, ...] = (), kind: str = "step"
    ) -> None:
        """Write a line at once. A disk error is reported once; the missing lines are written when the disk works again."""
        line = JournalLine(step, kind, values, groups)
        self._waiting.append(line)
        if kind == "eval":
            self._evaluated[step] = values
        behind = bool(self._missing)
        self._missing.append(line)
        text = "".join(map(_dumps, self._missing)).encode()
        try:
            if behind:
                # A line that was cut off may be in the way.
                self._replace(self.path.read_bytes()[: self._written] + text)
            else:
                with self.path.open("ab") as file:
                    file.write(text)
        except OSError as error:
            if not behind:
                log.warning("%s cannot be written, training goes on without it: %s", self.path, error)
        else:
            self._written += len(text)
            self._missing = []

    def _replace(self, text: bytes) -> None:
        aside = self.path.with_name(self.path.name + ".partial")
        aside.write_bytes(text)
        os.replace(aside, self.path)

    def evaluation(self, step: int) -> dict[str, float | None] | None:
        """Return the result of the evaluation of `step`; None if there is none."""
        return self._evaluated.get(step)

    def steps(self) -> list[JournalLine]:
        """Return the lines of all steps, which are read from the file."""
        return [line for line in [*read_lines(self.path), *self._missing] if line.kind == "step"]

    def take(self, step: int) -> list[JournalLine]:
        """Return the lines not returned before, in order, up to the first that belongs to a later step."""
        count = next((i for i, line in enumerate(self._waiting) if line.step > step), len(self._waiting))
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def journal_path(root: Path, stage: str) -> Path:
    return root / "stages" / f"{stage}.steps.jsonl"


def _dumps(line: JournalLine) -> str:
    row: dict[str, Any] = {"step": line.step, "kind": line.kind, "values": line.values}
    if line.groups:
        row["groups"] = list(line.groups)
    return dumps(row) + "\n"


def read_lines(path: Path) -> list[JournalLine]:
    """Return the lines of a journal, none if there is no file; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            row = json.loads(text)
            lines.append(JournalLine(row["step"], row["kind"], row["values"], tuple(row.get("groups", ()))))
        except (json.JSONDecodeError, KeyError):
            # Only the last line can be torn, by a crash while it was written.
            break
    return lines

"""The steps of a stage, one JSON line each, in `run_root/stages/<stage>.steps.jsonl`.

Invariants:
* a line is written when its step happens;
* a resumed stage rewinds the file to its checkpoint's step, so the file has one history;
* the tracker takes lines only up to a checkpoint's step, so a step that a crash undoes was never in the charts.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
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


@dataclass
class StepJournal:
    """Appends lines; `take(step)` hands out those up to a step that were not taken yet."""

    path: Path
    _lines: list[JournalLine] = field(default_factory=list)
    _taken: int = 0
    _behind: bool = False

    @classmethod
    def open(cls, path: Path, step: int) -> StepJournal:
        """Return the journal that a stage at `step` continues: later lines, and a torn last one, are cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = cls(path)
        journal._lines = [line for line in read_lines(path) if line.step <= step] if step else []
        journal._rewrite()
        return journal

    def append(
        self, step: int, values: dict[str, float | None], groups: tuple[str, ...] = (), kind: str = "step"
    ) -> None:
        """Write a line at once. A disk error is reported once; the missing lines are written when the disk works again."""
        line = JournalLine(step, kind, values, groups)
        self._lines.append(line)
        try:
            if self._behind:
                self._rewrite()
            else:
                with self.path.open("a") as file:
                    file.write(_dumps(line))
        except OSError as error:
            if not self._behind:
                log.warning("%s cannot be written, training goes on without it: %s", self.path, error)
            self._behind = True
        else:
            self._behind = False

    def _rewrite(self) -> None:
        aside = self.path.with_name(self.path.name + ".partial")
        aside.write_text("".join(_dumps(line) for line in self._lines))
        os.replace(aside, self.path)

    def has(self, kind: str, step: int) -> bool:
        return any(line.kind == kind and line.step == step for line in self._lines)

    def of_kind(self, kind: str) -> list[JournalLine]:
        return [line for line in self._lines if line.kind == kind]

    def take(self, step: int) -> list[JournalLine]:
        """Return the lines not returned before, in order, up to the first that belongs to a later step."""
        taken = []
        while self._taken < len(self._lines) and self._lines[self._taken].step <= step:
            taken.append(self._lines[self._taken])
            self._taken += 1
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

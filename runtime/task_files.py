"""The task files of a run: read once, judged once for every use, with a list of what was left out.

Invariants:
* a file is read, and its videos of unknown length are opened, once a run;
* rows are judged before the first stage that needs them trains, for the stages to come as well;
* every sample that a stage leaves out is named, counted, and in the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from conf.schema import RunConfig
from runtime.cluster.session import Session
from runtime.rows import (
    ORACLE_SECONDS,
    JudgedRows,
    RowUse,
    judge_rows,
    play_oracle,
    tell_oracle,
    tell_overlap,
    tell_rows,
)
from streams.data.dataset import SkippedSample, TaskFile, counted, load_tasks, with_lengths
from streams.data.rows import TaskRows
from streams.support.terminal import one_line
from streams.task import StreamTask


class Skipping(Protocol):
    """A stage's result: it names the samples that the stage left out."""

    skipped: list[SkippedSample]


@dataclass
class TaskFiles:
    """What one invocation reads of `data.train` and `data.heldout`.

    Attributes:
        read: by split, the files that have been read, videos of unknown length apart.
        skipped: every sample that was left out so far, by any stage of this invocation.
        judged: the verdicts on the rows, by the name of the use.
    """

    config: RunConfig
    say: Callable[[str], None]
    read: Mapping[str, TaskFile | None] = field(default_factory=dict)
    skipped: list[SkippedSample] = field(default_factory=list)
    judged: dict[str, JudgedRows] = field(default_factory=dict)
    _files: dict[str, TaskFile] = field(default_factory=dict)

    def file(self, split: str) -> TaskFile:
        """Return the rows of `train` or `heldout` that can be read. Raises ValueError or OSError if none can."""
        if split not in self._files:
            data = self.config.data
            path = getattr(data, split) or self.config.root.resolve() / "data" / f"{split}.jsonl"
            found = self.read.get(split)
            if found is None:
                found = load_tasks(path, format=data.format, ignore_fields=data.ignore_fields, root=data.root)
            self._files[split] = with_lengths(path, found, data.video)
        return self._files[split]

    def expect(self, split: str, longest: StreamTask, count: int) -> None:
        """Plan for `count` rows that are yet to be generated, none longer than `longest`."""
        self._files[split] = TaskFile(TaskRows.of([longest]).select([0] * count), ())

    def tasks(self, split: str) -> Sequence[StreamTask]:
        """Return the rows of a file, after naming those that cannot be read."""
        loaded = self.file(split)
        for sample in loaded.skipped:
            self.say(one_line(f"data: skipped {sample.source}: {sample.reason}"))
        self.skipped += loaded.skipped
        return loaded.tasks

    def judge(self, stage: str, uses: Sequence[RowUse], session: Session, checkpoint: Path) -> None:
        """Name the rows that cannot be answered: of this stage and, as early as they can be known, of those to come.

        uses: of all stages that are not over. checkpoint: its tokenizer is asked.
        """
        for use in uses:
            if use.name in self.judged or (use.name != stage and use.own_checkpoint(self.config)):
                continue
            tasks = self.file(use.split).tasks
            rows = self.judged[use.name] = judge_rows(self.config, session, tasks, checkpoint, use)
            what = f"{use.name}: {use.split}"
            tell_rows(self.say, what, rows)
            if use.script is None and rows.tasks:
                report = play_oracle(self.config, session, rows.tasks, rows.fits, ORACLE_SECONDS)
                tell_oracle(self.say, what, report, rows)
            if not use.trains and any(other.trains for other in uses):
                tell_overlap(self.say, self.file("train").tasks, tasks)

    def usable(self, use: RowUse) -> Sequence[StreamTask]:
        """Return the rows that a training stage trains on, once they are judged. Raises ValueError without any."""
        rows = self.judged[use.name]
        if not rows.tasks:
            first = rows.skipped[0]
            raise ValueError(
                f"{use.name}: data.{use.split} holds no row that can be used under these settings (named above), for example "
                f"{first.source}: {first.reason}"
            )
        return rows.tasks

    def note(self, use: RowUse, result: Skipping) -> None:
        """Put the rows that were left out before the stage in front of the samples that it skipped."""
        result.skipped = [*self.judged[use.name].skipped, *result.skipped]
        self.skipped += result.skipped
        result.skipped = [*self.file(use.split).skipped, *result.skipped]
        if result.skipped:
            counts = ", ".join(f"{kind} {count}" for kind, count in counted(result.skipped).items())
            self.say(f"{use.name}: left out, by reason: {counts} (all of them: stages/{use.name}.json)")

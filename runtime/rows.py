"""Which rows of a file a stage can use: judged before the stage starts, named with counts by reason.

Times are judged here, texts by the checkpoint's tokenizer (in a rollout worker), and what a perfect stream earns by the
run's own reward (in the scorers). Problems that only the video shows are found when it is read, and counted with the
rest.

Invariants:
* a training row from which nothing can be learned is left out;
* a training row that can be answered in part is kept and named;
* a held-out row is always kept: what cannot be answered counts as wrong.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.schema import RunConfig
from rewards.compose import RewardResult
from rewards.scripted import oracle_turns
from runtime.cluster.session import Session
from streams.answers.judge import is_correct
from streams.data.answerable import Finding, lost, overlap, too_long, untimely
from streams.data.dataset import SkippedSample, at_row, counted
from streams.data.rows import TaskRows
from streams.messages import RewardJob, RowTexts, RowWords, ScriptedTurn
from streams.support.terminal import one_line
from streams.task import Plan, Reason, StreamTask

NAMED = 5
"""Rows of one kind that are printed; summary.json has all of them."""
GOOD_ORACLE = 0.99
ORACLE_SECONDS = 20.0
"""Seconds that the oracle may play. The built-in rewards take less for 20,000 rows; a user's reward may be slow."""
MOST_PLAYED = 50_000
"""Rows that it plays in that time, at most: rows that are chosen are held in memory."""
ROWS_AT_ONCE = 4096
"""Rows of a message to the tokenizer."""
ASK_S = 0.5
"""Seconds of work that the oracle asks for at once, about: then it looks at the clock."""
EXACT_TERMS = ("correctness", "thinkstream_correctness")
"""Terms that compare with the expected words. Under others a shorter answer in the model's own words may do as well."""


Script = Callable[[RunConfig, StreamTask], tuple[tuple[int, ScriptedTurn], ...]]
Score = Callable[[Sequence[RewardJob]], Sequence[tuple[RewardResult, ...]]]
"""Returns the rewards of jobs: for each job, one result per stream."""
OracleRow = tuple[StreamTask, Plan, Mapping[int, str]]
"""A row for the scripted oracle to play. The last: by index, the part of a long answer that it says, as in RowWords."""


@dataclass(frozen=True)
class RowUse:
    """What a stage does with the rows of a task file.

    Attributes:
        name: the use, in messages: the stage's name.
        split: `train` or `heldout`: which file.
        trains: a row of which nothing can be learned is left out. False: it stays, and counts as wrong.
        script: the turns with words that a demonstration of a row has, by turn. None: the model finds its own words.
        own_checkpoint: whether the stage starts from a checkpoint that the run does not make. Its tokenizer may be another
            one, so the rows are judged when it starts.
    """

    name: str
    split: str
    trains: bool
    script: Script | None = None
    own_checkpoint: Callable[[RunConfig], bool] = lambda config: False


@dataclass(frozen=True)
class JudgedRows:
    """tasks: what the stage uses. skipped: rows left out. kept: used, though not all of it can be answered.

    fits: by task id, then index of an answer that is longer than a turn: what a turn can hold of it.
    """

    tasks: TaskRows
    skipped: tuple[SkippedSample, ...]
    kept: tuple[SkippedSample, ...]
    fits: Mapping[str, Mapping[int, str]]


def judge_rows(config: RunConfig, session: Session, tasks: TaskRows, checkpoint: Path, use: RowUse) -> JudgedRows:
    """Judge the rows of a file for a stage that starts from the folder `checkpoint`."""

    def asked(rows: tuple[RowTexts, ...]) -> tuple[RowWords, ...]:
        words: tuple[RowWords, ...] = session.crew.of_any_worker(
            lambda worker: worker.read_rows.remote(str(checkpoint), config.layout, rows),
            f"read {len(rows)} rows with the tokenizer of {checkpoint}",
        )
        return words

    def words() -> Iterator[RowWords]:
        for begin in range(0, len(tasks), ROWS_AT_ONCE):
            yield from asked(row_texts(config, tasks[begin : begin + ROWS_AT_ONCE], use))

    return judged(config, tasks, words(), use)


def row_texts(config: RunConfig, tasks: Iterable[StreamTask], use: RowUse) -> tuple[RowTexts, ...]:
    """Return what the tokenizer is asked about: the texts of the rows and, if the stage has any, of demonstrations."""
    return tuple(RowTexts(task, use.script(config, task) if use.script else ()) for task in tasks)


def judged(config: RunConfig, tasks: TaskRows, words: Iterable[RowWords], use: RowUse) -> JudgedRows:
    """Return the verdict on every row, from its times and from what the tokenizer found."""
    used = array("Q")
    fits: dict[str, Mapping[int, str]] = {}
    skipped: list[SkippedSample] = []
    kept: list[SkippedSample] = []
    for number, (task, said) in enumerate(zip(tasks, words, strict=True)):
        if said.fits:
            fits[task.id] = said.fits
        findings = _findings(config, task, said, use)
        samples = [SkippedSample.of(task, finding.reason, finding.kind) for finding in findings]
        if use.trains and (said.refused is not None or lost(task, findings)):
            # One entry a row: the counts are of rows.
            skipped.append(samples[0])
            continue
        used.append(number)
        kept += samples
    return JudgedRows(tasks.select(used), tuple(skipped), tuple(kept), fits)


def _findings(config: RunConfig, task: StreamTask, said: RowWords, use: RowUse) -> list[Finding]:
    """Return all that cannot be answered in a row; a refusal of the whole row comes first."""
    found = [Finding(*said.refused)] if said.refused is not None else []
    found += untimely(task, config.data.plan_of(task), config.data.max_turns)
    if use.script or not asks_for_the_words(config):
        return found  # a demonstration that is too long is refused as a whole
    for i, text in said.fits.items():
        answer = task.answers[i]
        if not is_correct(text, answer.text, answer.kind):
            found.append(too_long(i, text, config.layout.max_new_tokens))
    return found


def asks_for_the_words(config: RunConfig) -> bool:
    """Return whether the reward compares responses with the expected text."""
    terms = config.reward.terms
    return any(params.get("target", name) in EXACT_TERMS for name, params in terms.items())


def tell_rows(say: Callable[[str], None], what: str, judged: JudgedRows) -> None:
    """Say what is left out and what is kept, with counts by reason and some examples of each."""
    for samples, how in ((judged.skipped, "left out"), (judged.kept, "used, but not all of it can be answered")):
        if not samples:
            continue
        rows = len({sample.source for sample in samples})
        counts = ", ".join(f"{kind} {count}" for kind, count in counted(samples).items())
        say(f"{what}: {rows} rows {how}: {counts} (all of them: stages/*.json, summary.json)")
        for kind in sorted({sample.kind for sample in samples}):
            of_kind = [sample for sample in samples if sample.kind == kind]
            for sample in of_kind[:NAMED]:
                say(one_line(f"{what}: {kind}: {sample.source}: {sample.reason}"))
            if len(of_kind) > NAMED:
                say(f"{what}: {kind}: and {len(of_kind) - NAMED} more")


def tell_overlap(say: Callable[[str], None], train: Sequence[StreamTask], heldout: Sequence[StreamTask]) -> None:
    """Warn about held-out questions that are trained on."""
    pairs = overlap(train, heldout)
    if pairs:
        task, other = pairs[0]
        say(
            one_line(
                f"warning: {len(pairs)} of {len(heldout)} held-out rows ask what a training row asks about the same video, for "
                f"example {task.id}{at_row(task)} and {other.id}{at_row(other)}: their results do not show what was learned "
                "beyond the training rows"
            )
        )


@dataclass(frozen=True)
class OracleReport:
    """played: (task, result) of the rows that were played. think_tokens: length of the oracle's think spans."""

    played: tuple[tuple[StreamTask, RewardResult], ...]
    think_tokens: int

    @property
    def reward(self) -> float:
        return float(np.mean([result.total for _, result in self.played])) if self.played else math.nan


def play_oracle(
    config: RunConfig,
    session: Session,
    tasks: Sequence[StreamTask],
    fits: Mapping[str, Mapping[int, str]],
    seconds: float = math.inf,
) -> OracleReport:
    """Score a scripted oracle, which gives every expected answer in time, with the run's reward.

    fits: by task id and answer index, the part of an answer that a turn can hold. seconds: when to stop; the rows are
    then a sample of the file.
    """
    # Spread over the file, in case there is no time for all.
    order: Sequence[int] = range(len(tasks))
    if math.isfinite(seconds):
        order = np.random.default_rng(0).permutation(len(tasks))[:MOST_PLAYED].tolist()
    chosen = [tasks[i] for i in order]
    rows = [(task, config.data.plan_of(task), fits.get(task.id, {})) for task in chosen]
    results, think_tokens = best_oracle(
        lambda jobs: session.crew.score(jobs, "the scripted oracle"), rows, config.layout.think_budget, seconds
    )
    return OracleReport(tuple(zip(chosen, results, strict=False)), think_tokens)


def best_oracle(
    score: Score, rows: Sequence[OracleRow], think_tokens: int, seconds: float
) -> tuple[list[RewardResult], int]:
    """Play the scripted oracle over the rows. Returns one result per row, and the length of its think spans.

    The oracle thinks nothing, or `think_tokens` tokens a turn if that earns more over all rows: a reward may pay for either.
    Rows are played in order until `seconds` are over; there are then fewer results.
    """
    best = _play(score, rows, 0, time.monotonic() + seconds / 2)
    if all(result.total == 1 for result in best):
        return best, 0
    # A reward that failed on a row may have cost minutes: it is not asked again.
    good = [i for i, result in enumerate(best) if result.failed is None]
    again = _play(score, [rows[i] for i in good], think_tokens, time.monotonic() + seconds / 2)
    if _total(again) <= _total([best[i] for i in good[: len(again)]]):
        return best, 0
    thinking = dict(zip(good, again, strict=False))
    reached = len(best) if len(again) == len(good) else good[len(again)]
    return [thinking.get(i, best[i]) for i in range(reached)], think_tokens


def _play(score: Score, rows: Sequence[OracleRow], think_tokens: int, over: float) -> list[RewardResult]:
    """Return the oracle's result per row; fewer, but at least one, once the clock (time.monotonic) is past `over`."""
    played: list[RewardResult] = []
    asked = 1
    while len(played) < len(rows) and (not played or time.monotonic() <= over):
        began = time.monotonic()
        jobs = [
            RewardJob(task.id, task, plan, (oracle_turns(task, plan, said, think_tokens),))
            for task, plan, said in rows[len(played) : len(played) + asked]
        ]
        played += [result for (result,) in score(jobs)]
        # A reward may be slow: what is asked at once is what it does in a moment.
        asked = 2 * asked if time.monotonic() - began < ASK_S else max(1, asked // 2)
    return played


def _total(results: Sequence[RewardResult]) -> float:
    return sum(result.total for result in results)


def tell_oracle(say: Callable[[str], None], what: str, report: OracleReport, judged: JudgedRows) -> None:
    """Warn about a reward that even the oracle does not earn, with the rows that cost it."""
    total = len(judged.tasks)
    failed = [(task, result.failed) for task, result in report.played if result.failed is not None]
    if failed:
        _, cause = failed[0]
        say(
            one_line(
                f"{what}: warning: the reward failed on {len(failed)} of {len(report.played)} rows that a scripted oracle "
                f"played, for example: {cause}"
            )
        )
    if not report.played or report.reward >= GOOD_ORACLE:
        return
    costly = sorted(
        ((result.total, task, result.failed) for task, result in report.played if result.total < GOOD_ORACLE),
        key=lambda row: row[0],
    )
    sample = "" if len(report.played) == total else f" of {total} (more would have taken over {ORACLE_SECONDS:g} s)"
    say(
        f"{what}: warning: a scripted oracle, which gives every expected answer in time, earns {report.reward:.3f} of 1 over "
        f"{len(report.played)} rows{sample}. {len(costly)} rows cost it, the worst:"
    )
    why: dict[str, str] = {}
    for found in judged.kept:
        why.setdefault(found.source, f"{found.kind}: {found.reason}")
    for reward, task, raised in costly[:NAMED]:
        reason = raised or why.get(
            SkippedSample.of(task, "", Reason.STREAM).source, f"by the reward's own rule{at_row(task)}"
        )
        say(one_line(f"{what}: task {task.id} earns {reward:.3f}: {reason}"))

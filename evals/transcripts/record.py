"""Transcripts: what a model saw, held in memory, thought and said at every turn of some held-out streams.

`run_root/transcripts/<result>.jsonl` holds one stream a line in format 1, written down in
docs/transcripts.md; `<last checkpoint>.html` shows all results of the evaluation side by side.

Invariants:
* files are replaced whole or not at all;
* only logs travel to the driver; frames of the chosen streams are read again from their videos;
* a transcript that cannot be made is reported and left out; the evaluation goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from evals.categories import category_name
from evals.heldout import EvalResult, ScoredStream
from evals.transcripts.choose import choose
from evals.transcripts.occupancy import TurnMemory, lives, turn_memory
from evals.transcripts.page import write_page
from rewards.compose import AnswerResult, Reward
from rewards.outcome import due_answers
from rewards.timing import Timing, timing_score
from runtime.cluster.session import Session
from runtime.tracking.progress import Progress
from runtime.tracking.tracker import Tracker
from streams.log.record import ChunkRecord, Kind, StreamLog
from streams.support.files import write_atomic
from streams.support.strict_json import dumps
from streams.task import StreamTask
from streams.turns import ParsedTurn

FORMAT = 1
TEXT_KINDS = tuple(kind for kind in Kind if kind not in (Kind.SYSTEM, Kind.VIDEO))
OUTCOMES = ("right", "late", "early", "wrong", "silent")


def write_transcripts(
    config: RunConfig,
    session: Session,
    results: Mapping[str, EvalResult],
    checkpoints: Sequence[str],
    tracker: Tracker,
    progress: Progress,
) -> None:
    """Write the JSONL of every result and one page, named after the last of `checkpoints`, and give them to the tracker."""
    if not config.eval.transcripts:
        return
    try:
        page, notes = _write(config, session, results, checkpoints, tracker)
    except Exception as error:  # noqa: BLE001 - named boundary: the transcripts
        progress.say(f"transcripts: not written: {type(error).__name__}: {error}")
        return
    for note in notes:
        progress.say(f"transcripts: {note}")
    progress.say(f"transcripts: {page} (open it in a browser)")


def _write(
    config: RunConfig,
    session: Session,
    results: Mapping[str, EvalResult],
    checkpoints: Sequence[str],
    tracker: Tracker,
) -> tuple[Path, tuple[str, ...]]:
    last = checkpoints[-1]
    before = {s.task.id: s.result.total for s in results[checkpoints[-2]].streams} if len(checkpoints) > 1 else {}
    chosen = choose(results[last].streams, before, config.eval.transcripts)
    timing = Reward.from_config(config.reward).timing
    folder = config.root.resolve() / "transcripts"
    records: dict[str, list[dict[str, Any]]] = {}
    left_out: list[str] = []
    # The last checkpoint first: it is the one that the page opens with.
    for name in sorted(results, key=lambda name: (name != last, list(results).index(name))):
        by_id = {stream.task.id: stream for stream in results[name].streams}
        lines, texts = [], []
        for task in (task for task in chosen if task in by_id):
            stream = by_id[task]
            try:
                log = None
                if stream.payload is not None:
                    log = session.call(stream.payload, f"the log of {task}").logs[0]
                line = record(name, stream, log, timing)
                texts.append(dumps(line, ensure_ascii=False) + "\n")
            except Exception as error:  # noqa: BLE001 - named boundary: one stream's transcript
                left_out.append(f"{name}: no transcript of {task}: {type(error).__name__}: {error}")
                continue
            lines.append(line)
        if lines:
            records[name] = lines
            path = folder / f"{name}.jsonl"
            write_atomic(path, "".join(texts))
            tracker.artifact(path)
    if left_out and not records:
        raise ValueError("; ".join(left_out))
    page = folder / f"{last}.html"
    shown = {name: (result.n, len(result.streams), result.reward) for name, result in results.items()}
    notes = write_page(page, records, config.data.video, config.eval.transcript_mb, shown)
    tracker.artifact(page)
    return page, (*left_out, *notes)


def record(result: str, stream: ScoredStream, log: StreamLog | None, timing: Timing) -> dict[str, Any]:
    """Return one stream in format 1.

    log: None if it could not be run; what only the log knows is null then.
    """
    # The clock that the stream was run and scored by.
    task, chunk_seconds = stream.task, stream.plan.chunk_seconds
    memory = turn_memory(log) if log is not None else ()
    chunks = {chunk.turn: chunk for chunk in log.chunks} if log is not None else {}
    video = lives(log, (Kind.VIDEO,)) if log is not None else ()
    text = lives(log, TEXT_KINDS) if log is not None else ()
    turns = []
    for turn in stream.turns:
        begin = task.start + turn.turn * chunk_seconds
        # A row without an end: the turn lasts as long as its chunk, and the stream as far as its turns go.
        line = _said(turn) | {"start": round(begin, 6), "end": round(min(begin + chunk_seconds, task.end), 6)}
        line["queries"] = [i for i, q in enumerate(task.queries) if task.chunk_of(q.time, chunk_seconds) == turn.turn]
        line |= _held(memory[turn.turn] if memory else None)
        line["video"] = _shown(chunks.get(turn.turn), video[turn.turn] if memory else ())
        line["text_live"] = [list(change) for change in text[turn.turn]] if memory else []
        turns.append(line)
    return {
        "format": FORMAT,
        "result": result,
        "id": task.id if log is None else log.header.stream_id,
        "task": task.id,
        "category": category_name(task.category),
        "video": task.video,
        "start": task.start,
        "end": task.end if math.isfinite(task.end) else None,
        "chunk_seconds": chunk_seconds,
        "policy": {"name": log.header.policy, **dict(log.header.policy_knobs)} if log is not None else None,
        "versions": list(log.versions) if log is not None else [],
        "failed": stream.failed,
        "reward": stream.result.total,
        "components": stream.result.components,
        "reward_failed": stream.result.failed,
        "queries": [asdict(q) | {"turn": task.chunk_of(q.time, chunk_seconds)} for q in task.queries],
        "answers": _answers(stream, timing),
        "turns": turns,
    }


def outcome(answer: AnswerResult) -> str:
    """Return one of OUTCOMES. late, early: right in content, but without the full timing score."""
    if answer.response_turn is None:
        return "silent"
    if not answer.correct:
        return "wrong"
    if answer.timing >= 1 or answer.response_turn == answer.due_turn:
        return "right"
    return "late" if answer.response_turn > answer.due_turn else "early"


def _answers(stream: ScoredStream, timing: Timing) -> list[dict[str, Any]]:
    said = {turn.turn: turn.response for turn in stream.turns}
    task: StreamTask = stream.task
    dues = due_answers(task, stream.plan.chunk_seconds)
    lines = []
    for due, expected, got in zip(dues, task.answers, stream.result.answers, strict=True):
        scores = [
            (turn, timing_score(turn, due.due_turn, due.query_turn, **asdict(timing))) for turn in range(len(said))
        ]
        lines.append(
            {
                "index": due.index,
                "query": due.query,
                "time": expected.time,
                "text": expected.text,
                "kind": expected.kind,
                "query_turn": due.query_turn,
                "due_turn": due.due_turn,
                "window": [[turn, round(score, 6)] for turn, score in scores if score > 0],
                "response_turn": got.response_turn,
                "response": None if got.response_turn is None else said[got.response_turn],
                "outcome": outcome(got),
                "correct": got.correct,
                "timing": got.timing,
                "value": got.value,
                "components": got.components,
            }
        )
    return lines


def _said(turn: ParsedTurn) -> dict[str, Any]:
    return asdict(turn)


def _held(memory: TurnMemory | None) -> dict[str, Any]:
    """Return the counts of one turn; null where there is no log."""
    if memory is None:
        return dict.fromkeys(("tokens", "live_tokens", "video_tokens", "text_tokens", "evicted_tokens", "live"))
    return {
        "tokens": memory.tokens,
        "live_tokens": memory.live_tokens,
        "video_tokens": memory.video_tokens,
        "text_tokens": memory.live_tokens - memory.video_tokens,
        "evicted_tokens": memory.evicted,
        "live": {kind.name.lower(): count for kind, count in memory.live.items()},
    }


def _shown(chunk: ChunkRecord | None, life: tuple[tuple[int, int], ...]) -> dict[str, Any] | None:
    """Return the chunk of one turn and its life in memory; None for a turn without video, or without a log."""
    if chunk is None:
        return None
    return {
        "frame_times": [round(time, 6) for time in chunk.frame_times],
        "grid": list(chunk.grid),
        "tokens": chunk.num_tokens,
        "live": [list(change) for change in life],
    }

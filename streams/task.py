"""What one dataset row says: a video, timed queries, timed expected answers; how its stream runs, and why it may not.

Times are seconds on the video's own clock. Chunk indices count from `StreamTask.start`.

Invariants (checked by the constructors, so they are true of every StreamTask):
* start < end; end is infinite where the row does not say how long its video is, and the stream then ends with the video
  at the latest;
* queries are sorted by time and lie in [start, end);
* every answer names an existing query, is due no earlier than that query, and is due before end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, get_args

AnswerKind = Literal["choice", "yes_no", "integer", "text"]
ANSWER_KINDS: tuple[str, ...] = get_args(AnswerKind)


@dataclass(frozen=True)
class TimedQuery:
    """A question that reaches the model at `time`.

    A response closes it, unless `stay_open` is set: then it closes at `until` (seconds), or never if that is None.
    Raises ValueError for an empty text, an `until` that is not later than `time`, or one without `stay_open`.
    """

    time: float
    text: str
    stay_open: bool = False
    until: float | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"query text is empty at time {self.time}")
        if self.until is not None and self.until <= self.time:
            raise ValueError(f"query until={self.until} must be later than its time {self.time}")
        if self.until is not None and not self.stay_open:
            raise ValueError(f"query until={self.until} has no effect without stay_open=true")


@dataclass(frozen=True)
class ExpectedAnswer:
    """The answer that becomes due at `time` to query number `query` (index into StreamTask.queries).

    Raises ValueError for an empty text or an unknown kind.
    """

    time: float
    text: str
    kind: AnswerKind = "text"
    query: int = 0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"answer text is empty at time {self.time}")
        if self.kind not in ANSWER_KINDS:
            raise ValueError(f"answer kind {self.kind!r} is not one of {', '.join(ANSWER_KINDS)}")


class Reason(StrEnum):
    """Why a row is left out, or kept although part of it cannot be answered. The values are keys of summary.json."""

    UNREADABLE = "row_unreadable"
    CONTRADICTORY = "row_contradictory"
    CONTROL_TOKEN = "control_token"
    AFTER_LAST_TURN = "due_after_last_turn"
    ANSWER_TOO_LONG = "answer_too_long"
    THOUGHT_TOO_LONG = "thought_too_long"
    QUESTION_CLOSED = "question_closed"
    TURN_SHARED = "turn_shared"
    VIDEO = "video_unusable"
    REWARD = "reward_failed"
    STREAM = "stream_failed"


@dataclass(frozen=True)
class Plan:
    """How a stream over one task runs: `turns` chunks of `chunk_seconds` seconds each.

    It is made once, when the task is drawn (`DataConfig.plan_of`), and carried along: whoever runs, scores or records
    the stream uses this one.
    """

    turns: int
    chunk_seconds: float


@dataclass(frozen=True)
class TimedThought:
    """A demonstrated thought for the chunk that holds `time`."""

    time: float
    text: str


@dataclass(frozen=True)
class VideoFile:
    """What a row's video was when the row was read.

    root: the resolved folder that it must be in whenever it is opened. size: bytes; None: there was no such file.
    """

    root: str
    size: int | None


@dataclass(frozen=True)
class StreamTask:
    """One stream to watch: the segment [start, end) of a video file, with its questions and expected answers.

    Attributes:
        end: `math.inf` means as far as the video goes.
        origin: `FILE:LINE` of the row, '' for a task made in code. It takes no part in equality and is not written to
            files.
        file: what the video was when the row was read, None for a task made in code; treated as `origin` is.

    Raises ValueError if the fields contradict each other (see the invariants above).
    """

    id: str
    video: str
    start: float
    end: float
    queries: tuple[TimedQuery, ...]
    answers: tuple[ExpectedAnswer, ...]
    thoughts: tuple[TimedThought, ...] = ()
    category: str = ""
    origin: str = field(default="", compare=False, repr=False)
    file: VideoFile | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id is empty")
        if not 0 <= self.start < self.end:
            raise ValueError(f"start={self.start} and end={self.end} must satisfy 0 <= start < end")
        if not self.queries or not self.answers:
            raise ValueError("a task needs at least one query and one answer")
        for i, query in enumerate(self.queries):
            if not self.start <= query.time < self.end:
                raise ValueError(f"queries[{i}].time={query.time} lies outside [{self.start}, {self.end})")
            if i and query.time < self.queries[i - 1].time:
                raise ValueError(f"queries[{i}].time={query.time} is earlier than the query before it")
        for i, answer in enumerate(self.answers):
            if not 0 <= answer.query < len(self.queries):
                raise ValueError(f"answers[{i}].query={answer.query} names no query (there are {len(self.queries)})")
            if not self.queries[answer.query].time <= answer.time < self.end:
                raise ValueError(
                    f"answers[{i}].time={answer.time} must lie between its query "
                    f"({self.queries[answer.query].time}) and the end ({self.end})"
                )
        for i, thought in enumerate(self.thoughts):
            if not self.start <= thought.time < self.end:
                raise ValueError(f"thoughts[{i}].time={thought.time} lies outside [{self.start}, {self.end})")

    def chunk_of(self, time: float, chunk_seconds: float) -> int:
        """Return the index of the chunk that contains `time`; a time on a boundary belongs to the later chunk."""
        # In floating point a whole number of chunks can come out as 2.9999999...
        return math.floor((time - self.start) / chunk_seconds + 1e-6)

    def due_turns(self, chunk_seconds: float) -> int:
        """Return how many chunks it takes to reach the last expected answer, including the chunk it is due in."""
        return 1 + max(self.chunk_of(answer.time, chunk_seconds) for answer in self.answers)

    def num_turns(self, chunk_seconds: float, tail_chunks: int, max_turns: int) -> int:
        """Return the stream's length in chunks: up to the last expected answer plus `tail_chunks`.

        The end of the clip and `max_turns` cut it. Where the end is unknown, the reader drops tail chunks beyond the
        end of the video.
        """
        wanted = min(self.due_turns(chunk_seconds) + tail_chunks, max_turns)
        if math.isfinite(self.end):
            wanted = min(wanted, math.ceil((self.end - self.start) / chunk_seconds - 1e-6))
        return max(1, wanted)

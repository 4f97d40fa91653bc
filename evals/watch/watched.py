"""What is watched, and what one watched turn shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streams.task import TimedQuery


@dataclass(frozen=True)
class WatchedFile:
    """What is shown: the first `end` seconds of a file of `length`, with its queries (see streams.writing.inputs)."""

    video: str
    end: float
    queries: tuple[TimedQuery, ...]
    length: float
    start: float = 0.0
    id: str = "watch"

    def chunk_of(self, time: float, chunk_seconds: float) -> int:
        return math.floor(time / chunk_seconds + 1e-6)


@dataclass(frozen=True)
class WatchedTurn:
    """One line of output. memory_tokens: tokens a next token would see; of these, memory_video are video."""

    start_s: float
    end_s: float
    query: str
    thought: str
    response: str | None
    well_formed: bool
    memory_tokens: int
    memory_video: int
    seconds: float

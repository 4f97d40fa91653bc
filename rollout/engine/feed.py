"""Where an engine gets a stream's turns from: a sequence that is known, or a queue whose end is not.

Invariants:
* both have the same methods, so the engine runs them alike;
* a turn is handed out once, in order, and a queue drops it then;
* how much a stream may hold is known before its first turn.

Rollouts, evaluations and job=watch know their turns. `TurnFeed` is for live streams: no stage of a run has one. Programs
that drive an engine by themselves do (docs/memory.md), `benchmarks.endless` among them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from streams.layout.lanes import Lanes, Span
from streams.layout.layout import Layout
from streams.layout.runs import Run
from streams.log.record import NEVER, ChunkRecord, Kind
from streams.memory.live import LiveSet
from streams.writing.writer import TurnInput

_QUERY = int(Kind.QUERY)  # numpy takes members of an IntEnum, but several times as long as plain numbers
FAR_SECONDS = 99_999_999.9
"""Three years: no time of a stream is longer in words."""


@dataclass(frozen=True)
class TurnSizes:
    """What bounds a stream's KV slots, in tokens.

    Attributes:
        scaffold: the most of one turn besides video, queries and what is generated.
        video: the most of one turn's chunk.
        queries: the most of all queries that may be in memory at once.
        copies: the most of all copies of turns (two lanes only).
        turns: number of turns, NEVER if unknown.
    """

    scaffold: int
    video: int
    queries: int
    copies: int
    turns: int


def _scaffold(runs: Sequence[Run]) -> int:
    """Count the tokens that the layout puts around a chunk."""
    return sum(shape for run in runs for shape in run.shapes if isinstance(shape, int))


class KnownTurns:
    """A finite, indexable sequence of turns. `sizes` iterates over it once more: a lazy sequence makes every turn twice."""

    def __init__(self, turns: Sequence[TurnInput], features: Sequence[torch.Tensor]) -> None:
        self._turns, self._features = turns, features
        self._next = self._chunks = 0

    @property
    def ready(self) -> bool:
        """Whether there is a turn to take."""
        return self._next < len(self._turns)

    @property
    def ended(self) -> bool:
        """Whether no turn will ever come."""
        return not self.ready

    def take(self) -> tuple[TurnInput, torch.Tensor | None]:
        """Return the next turn and its chunk's features [tokens, F], None without a chunk."""
        turn = self._turns[self._next]
        self._next += 1
        if turn.chunk is None:
            return turn, None
        self._chunks += 1
        return turn, self._features[self._chunks - 1]

    def sizes(self, layout: Layout, lanes: Lanes) -> TurnSizes:
        """Return what bounds a stream of these turns."""
        # One pass, as a lazy sequence makes every turn anew. Turns differ in scaffold, too: a later time has more digits.
        scaffold = video = queries = 0
        spans: list[Span | None] = []
        counted: Sequence[Run] = ()
        for turn in self._turns:
            runs = layout.runs(turn.chunk, None)
            if runs is not counted:  # the layout keeps those of chunks alike
                scaffold, counted = max(scaffold, _scaffold(runs)), runs
            video = max(video, 0 if turn.chunk is None else turn.chunk.num_tokens)
            queries += 0 if turn.query is None else len(turn.query.ids) + 1
            spans.append(turn.span)
        # The last turn has no copy: no turn comes that could read it.
        copies = sum(layout.max_memory(span) for span in spans[:-1]) if lanes is Lanes.MEMORY else 0
        return TurnSizes(scaffold, video, queries, copies, len(self._turns))

    def refuses(self, held: LiveSet) -> str:
        """Return "": `sizes` counted all queries."""
        return ""


class TurnFeed:
    """A live stream's queue of turns: its owner pushes them as they come, from any one thread, and closes it."""

    def __init__(self, largest: ChunkRecord, query_tokens: int) -> None:
        """Announce what will come: the engine reserves slots for it before the first turn.

        Args:
            largest: no chunk has more tokens or temporal patches than this one; its times do not matter.
            query_tokens: the most tokens of queries that may be in memory at once, each query with one more for the newline
                before it. Open queries count, and closed ones whose text still stays.
        """
        self.largest, self.query_tokens = largest, query_tokens
        self._turns: deque[tuple[TurnInput, torch.Tensor | None]] = deque()
        self._closed = False

    def push(self, turn: TurnInput, features: torch.Tensor | None = None) -> None:
        """Append a turn, with its chunk's features [tokens, F] (see StreamRequest).

        Raises ValueError if the feed is closed, or if the turn is larger than announced.
        """
        if self._closed:
            raise ValueError("a turn was pushed into a feed that is closed")
        tokens = 0 if turn.chunk is None else turn.chunk.num_tokens
        if tokens > self.largest.num_tokens or (turn.chunk and turn.chunk.grid[0] > self.largest.grid[0]):
            raise ValueError(
                f"a chunk of {tokens} video tokens, {turn.chunk.grid[0]} temporal patches: the feed was made for chunks of at "  # type: ignore[union-attr]
                f"most {self.largest.num_tokens}, {self.largest.grid[0]}; give it a larger `largest`"
            )
        if (0 if features is None else len(features)) != tokens:
            raise ValueError(f"{0 if features is None else len(features)} features for {tokens} video tokens")
        self._turns.append((turn, features))

    def close(self) -> None:
        """Say that no turn follows: the stream ends with the last one pushed."""
        self._closed = True

    @property
    def ready(self) -> bool:
        """Whether there is a turn to take."""
        return bool(self._turns)

    @property
    def ended(self) -> bool:
        """Whether no turn will ever come."""
        return self._closed and not self._turns

    def take(self) -> tuple[TurnInput, torch.Tensor | None]:
        """Return the next turn and its chunk's features [tokens, F], None without a chunk."""
        return self._turns.popleft()

    def sizes(self, layout: Layout, lanes: Lanes) -> TurnSizes:
        """Return what bounds a stream of these turns."""
        # Turns that nobody knows yet: as many as there can be, and each with the longest time in words.
        far = replace(self.largest, patch_times=(FAR_SECONDS,) * self.largest.grid[0])
        copies = NEVER * layout.max_memory(None) if lanes is Lanes.MEMORY else 0
        return TurnSizes(_scaffold(layout.runs(far, None)), self.largest.num_tokens, self.query_tokens, copies, NEVER)

    def refuses(self, held: LiveSet) -> str:
        """Return why the next turn cannot be shown while these tokens are in memory; empty if it can."""
        query = self._turns[0][0].query
        queries = sum(size for _, (kind, _, size) in held.tokens().runs if kind == _QUERY)
        wanted = queries + (0 if query is None else len(query.ids) + 1)
        if wanted <= self.query_tokens:
            return ""
        return (
            f"{wanted} tokens of queries at once, its feed was made for query_tokens={self.query_tokens}: close queries "
            "earlier (`until`), or announce more"
        )

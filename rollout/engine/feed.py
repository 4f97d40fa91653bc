"""Where an engine gets a stream's turns from: a sequence that is known, or a feed whose end is not.

Both answer the same questions, so the engine runs them alike. Invariants: a turn is taken once, in order,
and is not kept here after that; how much a stream may hold is known before its first turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from streams.layout.lanes import Lanes, Span
from streams.layout.layout import Layout
from streams.log.record import NEVER, ChunkRecord, Kind
from streams.writing.writer import TurnInput

FAR_SECONDS = 99_999_999.9
"""Three years: no time of a stream is longer in words."""


@dataclass(frozen=True)
class TurnSizes:
    """The most tokens of one turn's scaffold and video, of all queries that may be held at once, of all copies; turns."""

    scaffold: int
    video: int
    queries: int
    copies: int
    turns: int


def _scaffold(layout: Layout, chunk: ChunkRecord | None) -> int:
    return sum(len(part.ids) for part in layout.prefill(chunk, None) if part.kind != Kind.VIDEO)


class KnownTurns:
    """Turns that can all be asked for; they are asked for again when their sizes are."""

    def __init__(self, turns: Sequence[TurnInput], features: Sequence[torch.Tensor]) -> None:
        self._turns, self._features = turns, features
        self._taken = self._chunks = 0

    @property
    def ready(self) -> bool:
        return self._taken < len(self._turns)

    @property
    def ended(self) -> bool:
        return not self.ready

    def take(self) -> tuple[TurnInput, torch.Tensor | None]:
        turn = self._turns[self._taken]
        self._taken += 1
        if turn.chunk is None:
            return turn, None
        self._chunks += 1
        return turn, self._features[self._chunks - 1]

    def sizes(self, layout: Layout, lanes: Lanes) -> TurnSizes:
        # One pass: a lazily made sequence makes every turn anew. They differ in scaffold, too: a later time has more digits.
        scaffold = video = queries = 0
        spans: list[Span | None] = []
        for turn in self._turns:
            scaffold = max(scaffold, _scaffold(layout, turn.chunk))
            video = max(video, 0 if turn.chunk is None else turn.chunk.num_tokens)
            queries += 0 if turn.query is None else len(turn.query.ids) + 1
            spans.append(turn.span)
        # The last turn has no copy: no turn comes that could read it.
        copies = sum(layout.max_memory(span) for span in spans[:-1]) if lanes is Lanes.MEMORY else 0
        return TurnSizes(scaffold, video, queries, copies, len(self._turns))

    def refuses(self, held: int) -> str:
        """All queries were counted."""
        return ""


class TurnFeed:
    """A live stream: its owner pushes turns as they come, from any one thread, and closes it.

    largest: a chunk that none is larger than (its times do not matter). query_tokens: the most tokens of queries, each
    with one more for the newline before it, that may be in memory at once: open ones, and closed ones whose text still stays.
    """

    def __init__(self, largest: ChunkRecord, query_tokens: int) -> None:
        self.largest, self.query_tokens = largest, query_tokens
        self._turns: deque[tuple[TurnInput, torch.Tensor | None]] = deque()
        self._closed = False

    def push(self, turn: TurnInput, features: torch.Tensor | None = None) -> None:
        """features: of its chunk, see StreamRequest. Raises ValueError for a turn that was not announced."""
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
        """No turn follows; the stream ends with the last one pushed."""
        self._closed = True

    @property
    def ready(self) -> bool:
        return bool(self._turns)

    @property
    def ended(self) -> bool:
        return self._closed and not self._turns

    def take(self) -> tuple[TurnInput, torch.Tensor | None]:
        return self._turns.popleft()

    def sizes(self, layout: Layout, lanes: Lanes) -> TurnSizes:
        far = replace(self.largest, patch_times=(FAR_SECONDS,) * self.largest.grid[0])
        copies = NEVER * layout.max_memory(None) if lanes is Lanes.MEMORY else 0
        return TurnSizes(_scaffold(layout, far), self.largest.num_tokens, self.query_tokens, copies, NEVER)

    def refuses(self, held: int) -> str:
        """Why the next turn cannot be shown while `held` tokens of queries are in memory; empty: it can."""
        query = self._turns[0][0].query
        wanted = held + (0 if query is None else len(query.ids) + 1)
        if wanted <= self.query_tokens:
            return ""
        return (
            f"{wanted} tokens of queries at once, its feed was made for query_tokens={self.query_tokens}: close queries "
            "earlier (`until`), or announce more"
        )

"""StreamWriter: writes one stream's log, turn by turn; the one place where layout, memory and positions meet.

Owner: streams. The rollout engine drives it with sampled tokens, SFT with demonstrated ones: both write the same log.
Order inside a turn: eviction, then prefill, then generation, then END. END belongs to its own turn's segment.
Invariants: a turn starts at its first prefilled token; eviction happens only between segments; queries are closed by
a turn that chose to respond, or by their `until` turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from streams.layout import Layout, Part, TurnState
from streams.live import LiveSet, TurnHistory
from streams.log import GENERATED_TEXT, ChunkRecord, Kind, LogBuilder, LogHeader, StreamLog
from streams.memory import CONTIGUOUS, MemoryPolicy, check_text_tells_time, evicted, placed
from streams.positions import PositionCursor
from streams.regions import RegionBook


@dataclass(frozen=True)
class QueryInput:
    """A query as ids; `until_turn` is None for a query that a response closes, NEVER for one that never closes."""

    ids: tuple[int, ...]
    until_turn: int | None = None


@dataclass(frozen=True)
class TurnInput:
    """What one turn shows: a chunk of video, a query, both, or neither."""

    chunk: ChunkRecord | None
    query: QueryInput | None = None


def check_timestamps_kept(layout: Layout, policy: MemoryPolicy) -> None:
    """Raises ValueError if text would leave before the video whose time it tells."""
    check_text_tells_time(policy, layout.timestamps)


@dataclass
class StreamWriter:
    """Writes the log of one stream. `held` are the tokens that are still visible; generated: text tokens so far."""

    header: LogHeader
    layout: Layout
    policy: MemoryPolicy
    positions: PositionCursor
    log: LogBuilder = field(init=False)
    held: LiveSet = field(default_factory=LiveSet)
    history: TurnHistory = field(default_factory=TurnHistory)
    turn: int = -1
    generated: int = 0
    state: TurnState | None = None
    _generation_begun: bool = False

    def __post_init__(self) -> None:
        check_timestamps_kept(self.layout, self.policy)
        self.log = LogBuilder(self.header, RegionBook() if self.policy.positions == CONTIGUOUS else None)

    @property
    def regions(self) -> RegionBook | None:
        """Where the live tokens stand; None if positions are native."""
        return self.log.regions

    @property
    def live(self) -> np.ndarray:
        """Log indices of the tokens that are still visible, in order."""
        return self.held.column("index")

    def begin_turn(self, turn_input: TurnInput, version: int) -> tuple[np.ndarray, slice]:
        """Evict, then append the prefill. Returns (evicted log indices, where the prefill stands)."""
        assert self.state is None or self.state.over, "the turn before has not ended"
        if self.state is not None and self.state.spoke:
            self.history.answered()
        self.turn += 1
        chunk, query = turn_input.chunk, turn_input.query
        left = self._evict(chunk)
        parts = self.layout.prefill(chunk, None if query is None else list(query.ids))
        start = self.log.begin_segment()
        if self.turn == 0:
            self._append(Part(np.asarray(self.layout.system_ids, np.int32), Kind.SYSTEM), version)
        for part in parts:
            self._append(part, version)
        if self.regions is not None:
            self.regions.settle(self.live, self.held.column("position"))
        if chunk is not None:
            self.log.add_chunk(chunk)
        if query is not None:
            self.history.ask(query.until_turn)
        self.state = TurnState(self.layout.tokens, self.layout.config)
        self._generation_begun = False
        return left, slice(start, self.log.length)

    def forced(self) -> int | None:
        """The id that must come next in this turn, None if the model chooses."""
        assert self.state is not None
        return self.state.forced()

    def append_generated(
        self,
        token: int,
        version: int,
        *,
        logp: float = float("nan"),
        sampled: bool = False,
        target: bool = False,
    ) -> Kind:
        """Append one generated token of the running turn; returns its kind."""
        assert self.state is not None
        assert not self.state.over, "the turn has ended"
        if not self._generation_begun:
            self.log.begin_segment()
            self._generation_begun = True
        kind = self.state.advance(token)
        positions = self.positions.text(1)
        at = self.log.append(
            [token],
            kind,
            positions,
            turn=self.turn,
            version=version,
            sampled=sampled,
            target=target,
            logp=logp,
        )
        text = kind in GENERATED_TEXT
        self.held.append(at, [token], positions, kind=kind, turn=self.turn, ordinal=self.generated if text else -1)
        self.generated += text
        return kind

    def finish(self) -> StreamLog:
        return self.log.finish()

    def _append(self, part: Part, version: int) -> None:
        if part.grid is None:
            positions = self.positions.text(len(part.ids))
        else:
            positions = self.positions.video(part.grid, part.keep)
        at = self.log.append(part.ids, part.kind, positions, turn=self.turn, version=version)
        self.held.append(at, part.ids, positions, kind=part.kind, turn=self.turn)

    def _evict(self, chunk: ChunkRecord | None) -> np.ndarray:
        """Let go what the policy names; returns its log indices."""
        start = self.history.begin(
            has_video=chunk is not None,
            video_tokens=0 if chunk is None else chunk.num_tokens,
            generated=self.generated,
        )
        leaving = evicted(self.policy, self.held.tokens(), start)
        left = self.held.drop(leaving)
        self.log.expire(left)
        if self.regions is not None:
            before = self.regions.leave(~leaving)
            self.regions.move(self.live, placed(self.policy, self.held.tokens(), start, before), self.log.length)
        return left

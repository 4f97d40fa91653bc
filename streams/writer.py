"""StreamWriter: writes one stream's log, turn by turn; the one place where layout, memory and positions meet.

Owner: streams. The rollout engine drives it with sampled tokens, SFT with demonstrated ones: both write the same log.
Order inside a turn: eviction, then prefill, then generation, then END. END belongs to its own turn's segment.
Invariants: a turn starts at its first prefilled token; eviction happens only between segments; queries are closed by
a turn that chose to respond, or by their `until` turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from streams.layout import Layout, Part, TurnState
from streams.log import GENERATED_TEXT, NEVER, ChunkRecord, Kind, LogBuilder, LogHeader, StreamLog
from streams.memory import CONTIGUOUS, LiveTokens, MemoryPolicy, TurnStart, check_text_tells_time, evicted, placed
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
    """Writes the log of one stream. `live` holds the log indices that are still visible, in order; `regions` keeps where they
    stand if positions are contiguous.
    """

    header: LogHeader
    layout: Layout
    policy: MemoryPolicy
    positions: PositionCursor
    log: LogBuilder = field(init=False)
    live: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    turn: int = -1
    state: TurnState | None = None
    regions: RegionBook | None = field(init=False)
    _video_turns: list[int] = field(default_factory=lambda: [0])
    # Generated text before each turn, and where each turn's begins in the log: both grow when a turn begins.
    _generated: list[int] = field(default_factory=list)
    _begins: list[int] = field(default_factory=list)
    _closed_in: list[int] = field(default_factory=list)
    _until: list[int | None] = field(default_factory=list)
    _generation_begun: bool = False

    def __post_init__(self) -> None:
        check_timestamps_kept(self.layout, self.policy)
        self.log = LogBuilder(self.header)
        self.regions = RegionBook() if self.policy.positions == CONTIGUOUS else None

    def begin_turn(self, turn_input: TurnInput, version: int) -> tuple[np.ndarray, slice]:
        """Evict, then append the prefill. Returns (evicted log indices, where the prefill stands)."""
        assert self.state is None or self.state.over, "the turn before has not ended"
        self._close_queries()
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
            first = self.regions.first_retained(self.live)
            self.regions.settle(self.live, int(self.log.positions_between(first, first + 1).min()))
        if chunk is not None:
            self.log.add_chunk(chunk)
        self._video_turns.append(self._video_turns[-1] + (chunk is not None))
        self._closed_in.append(NEVER)
        self._until.append(None)
        if query is not None and query.until_turn is not None:
            self._until[-1] = query.until_turn
            self._closed_in[-1] = query.until_turn
        self.state = TurnState(self.layout.tokens, self.layout.config)
        self._begins.append(self.log.length)
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
        at = self.log.append(
            [token],
            kind,
            self.positions.text(1),
            turn=self.turn,
            version=version,
            sampled=sampled,
            target=target,
            logp=logp,
        )
        self.live = np.append(self.live, at.start)
        return kind

    def finish(self) -> StreamLog:
        log = self.log.finish()
        return log if self.regions is None else replace(log, regions=self.regions.log())

    def _append(self, part: Part, version: int) -> None:
        if part.grid is None:
            positions = self.positions.text(len(part.ids))
        else:
            positions = self.positions.video(part.grid, part.keep)
        at = self.log.append(part.ids, part.kind, positions, turn=self.turn, version=version)
        self.live = np.concatenate([self.live, np.arange(at.start, at.stop)])

    def _close_queries(self) -> None:
        """After a turn that responded, close every query that has arrived, unless it stays open until its time."""
        if self.state is None or not self.state.spoke:
            return
        for turn in range(self.turn + 1):
            if self._until[turn] is None and self._closed_in[turn] == NEVER:
                self._closed_in[turn] = self.turn

    def _evict(self, chunk: ChunkRecord | None) -> np.ndarray:
        """Let go what the policy names; returns its log indices."""
        self._generated.append(self._generated_so_far())
        turn, kind = self.log.column("turn")[self.live], self.log.column("kind")[self.live]
        generated = np.asarray(self._generated, np.int64)
        # A turn's generated text stands in one piece behind its prefill.
        ordinal = np.full(len(self.live), -1, np.int64)
        text = np.isin(kind, GENERATED_TEXT)
        ordinal[text] = (generated[turn] + self.live - np.asarray(self._begins, np.int64)[turn])[text]
        live = LiveTokens(kind, turn, self.log.column("ids")[self.live], self.live, ordinal)
        start = TurnStart(
            turn=self.turn,
            has_video=chunk is not None,
            video_tokens=0 if chunk is None else chunk.num_tokens,
            video_turns=np.asarray(self._video_turns, np.int64),
            generated=generated,
            closed_in=np.asarray(self._closed_in, np.int64),
        )
        leaving = evicted(self.policy, live, start)
        left = self.live[leaving]
        self.log.expire(left)
        self.live = self.live[~leaving]
        if self.regions is not None:
            before = self.regions.leave(~leaving)
            self.regions.move(self.live, placed(self.policy, live.only(~leaving), start, before), self.log.length)
        return left

    def _generated_so_far(self) -> int:
        """Generated text tokens of all turns that have ended."""
        if not self._begins:
            return 0
        latest = self.log.column("kind")[self._begins[-1] :]
        return self._generated[-1] + int(np.isin(latest, GENERATED_TEXT).sum())

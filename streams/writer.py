"""StreamWriter: writes one stream's log, turn by turn; the one place where layout, memory and positions meet.

Owner: streams. The rollout engine drives it with sampled tokens, SFT with demonstrated ones: both write the same log.
Order inside a turn: eviction, then prefill, then generation, then END. END belongs to its own turn's segment. With two
lanes the copy of a turn follows its own eviction, when the next turn begins. A lane change starts a new segment.
Invariants: a turn starts at its first prefilled token; eviction happens only between segments; queries are closed by
a turn that chose to respond, or by their `until` turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from streams.lanes import Lanes, Span
from streams.layout import Layout, Part, TurnState
from streams.log import GENERATED_TEXT, NEVER, ChunkRecord, Kind, LogBuilder, LogHeader, StreamLog
from streams.memory import LiveTokens, MemoryPolicy, TurnStart, check_text_tells_time, evicted
from streams.positions import PositionCursor


@dataclass(frozen=True)
class QueryInput:
    """A query as ids; `until_turn` is None for a query that a response closes, NEVER for one that never closes."""

    ids: tuple[int, ...]
    until_turn: int | None = None


@dataclass(frozen=True)
class TurnInput:
    """What one turn shows: a chunk of video, a query, both, or neither. span: told by the copy of a turn, if there is one."""

    chunk: ChunkRecord | None
    query: QueryInput | None = None
    span: Span | None = None


def check_timestamps_kept(layout: Layout, policy: MemoryPolicy) -> None:
    """Raises ValueError if text would leave before the video whose time it tells."""
    check_text_tells_time(policy, layout.timestamps)


@dataclass
class StreamWriter:
    """Writes the log of one stream. `live` holds the log indices that are still visible, in order.

    positions: the counter of lane 0; lane 1 has one of its own.
    """

    header: LogHeader
    layout: Layout
    policy: MemoryPolicy
    positions: PositionCursor
    log: LogBuilder = field(init=False)
    _cursors: tuple[PositionCursor, PositionCursor] = field(init=False)
    live: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    turn: int = -1
    state: TurnState | None = None
    _video_turns: list[int] = field(default_factory=lambda: [0])
    # Generated text before each turn, and where each turn's begins in the log: both grow when a turn begins.
    _generated: list[int] = field(default_factory=list)
    _begins: list[int] = field(default_factory=list)
    _closed_in: list[int] = field(default_factory=list)
    _until: list[int | None] = field(default_factory=list)
    _generation_begun: bool = False
    # Where generation goes on, and of which time it is.
    _lane: int = 0
    _span: Span | None = None

    def __post_init__(self) -> None:
        check_timestamps_kept(self.layout, self.policy)
        self._cursors = (self.positions, replace(self.positions))
        self.log = LogBuilder(self.header)

    def begin_turn(self, turn_input: TurnInput, version: int) -> tuple[np.ndarray, slice]:
        """Evict, then append the prefill. Returns (evicted log indices, where the prefill stands)."""
        assert self.state is None or self.state.over, "the turn before has not ended"
        self._close_queries()
        self.turn += 1
        chunk, query = turn_input.chunk, turn_input.query
        left = self._evict(chunk)
        self._remember(version)
        start = self.log.length
        parts = self.layout.prefill(chunk, None if query is None else list(query.ids), self.policy.lanes)
        if self.turn == 0:
            parts = (Part(np.asarray(self.layout.system_ids, np.int32), Kind.SYSTEM), *parts)
        self._append(parts, self.turn, version)
        self._span = turn_input.span
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
            self._cursors[self._lane].text(1),
            turn=self.turn,
            version=version,
            lane=self._lane,
            sampled=sampled,
            target=target,
            logp=logp,
        )
        self.live = np.append(self.live, at.start)
        return kind

    def finish(self) -> StreamLog:
        return self.log.finish()

    def _append(self, parts: Sequence[Part], turn: int, version: int) -> None:
        """Append parts of one turn: a segment for every run of one lane."""
        lane = None
        for part in parts:
            if part.lane != lane:
                lane = self._lane = part.lane
                self.log.begin_segment()
                if lane == 1:
                    self._cursors[1].offset = self.policy.lane_one_begins(*(c.offset for c in self._cursors))
            cursor = self._cursors[part.lane]
            positions = cursor.text(len(part.ids)) if part.grid is None else cursor.video(part.grid, part.keep)
            at = self.log.append(part.ids, part.kind, positions, turn=turn, version=version, lane=part.lane)
            self.live = np.concatenate([self.live, np.arange(at.start, at.stop)])

    def _remember(self, version: int) -> None:
        """Append the copy of the turn before, to that turn. What left for the turn that begins has left before it."""
        if self.policy.lanes is not Lanes.MEMORY or self.turn == 0:
            return
        ids, kinds = (self.log.column(name)[self._begins[-1] :] for name in ("ids", "kind"))
        copy = self.layout.memory(ids, kinds, self._span)
        if copy is not None:
            self._append([copy], self.turn - 1, version)

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
        return left

    def _generated_so_far(self) -> int:
        """Generated text tokens of all turns that have ended."""
        if not self._begins:
            return 0
        latest = self.log.column("kind")[self._begins[-1] :]
        return self._generated[-1] + int(np.isin(latest, GENERATED_TEXT).sum())

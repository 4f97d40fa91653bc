"""StreamWriter: writes one stream's log, token by token.

Order inside a turn: eviction, then prefill, then generation, then END. END belongs to its own turn's segment. With two
lanes the copy of a turn follows its own eviction, when the next turn begins. A lane change starts a new segment.
Invariants: a turn starts at its first prefilled token; eviction happens only between segments; queries are closed by
a turn that chose to respond, or by their `until` turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from streams.layout.lanes import Lanes, Span
from streams.layout.layout import Layout, Part
from streams.log.record import GENERATED_TEXT, ChunkRecord, Kind, LogHeader, StreamLog
from streams.memory import CONTIGUOUS, MemoryPolicy, evicted, lane_one_start, placed
from streams.positions.mrope import PositionCursor
from streams.positions.regions import RegionBook
from streams.writing.writer import TurnInput, check_timestamps_kept
from tests.support.one_step.builder import LogBuilder
from tests.support.one_step.live import LiveSet, TurnHistory
from tests.support.one_step.turn_state import TurnState


@dataclass
class StreamWriter:
    """Writes the log of one stream. `held` are the tokens that are still visible; generated: text tokens so far.

    positions: the counter of lane 0; lane 1 has one of its own.
    """

    header: LogHeader
    layout: Layout
    policy: MemoryPolicy
    positions: PositionCursor
    log: LogBuilder = field(init=False)
    _cursors: tuple[PositionCursor, PositionCursor] = field(init=False)
    held: LiveSet = field(default_factory=LiveSet)
    history: TurnHistory = field(default_factory=TurnHistory)
    turn: int = -1
    generated: int = 0
    state: TurnState | None = None
    _generation_begun: bool = False
    # The running turn: where generation goes on, its time, the ids and kinds that it generated.
    _lane: int = 0
    _span: Span | None = None
    _wrote: list[tuple[int, Kind]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_timestamps_kept(self.layout, self.policy)
        self._cursors = (self.positions, replace(self.positions))
        self.log = LogBuilder(self.header, RegionBook() if self.policy.positions == CONTIGUOUS else None)

    @property
    def regions(self) -> RegionBook | None:
        """Return the positions of the live tokens; None if positions are native."""
        return self.log.regions

    @property
    def live(self) -> np.ndarray:
        """Return the log indices of the tokens that are still visible, in order."""
        return self.held.column("index")

    def begin_turn(self, turn_input: TurnInput, version: int) -> tuple[np.ndarray, slice]:
        """Evict, then append the prefill. Returns (evicted log indices, log indices of the prefill)."""
        assert self.state is None or self.state.over, "the turn before has not ended"
        if self.state is not None and self.state.spoke:
            self.history.answered()
        self.turn += 1
        chunk, query = turn_input.chunk, turn_input.query
        left = self._evict(chunk)
        self._remember(version)
        start = self.log.length
        parts = self.layout.prefill(chunk, None if query is None else list(query.ids), self.policy.lanes)
        if self.turn == 0:
            parts = (Part(np.asarray(self.layout.system_ids, np.int32), Kind.SYSTEM), *parts)
        self._append(parts, self.turn, version)
        if self.regions is not None:
            self.regions.settle(self.live, self.held.column("position"))
        self._span, self._wrote = turn_input.span, []
        if chunk is not None:
            self.log.add_chunk(chunk)
        if query is not None:
            self.history.ask(query.until_turn)
        self.state = TurnState(self.layout.tokens, self.layout.config)
        self._generation_begun = False
        return left, slice(start, self.log.length)

    def forced(self) -> int | None:
        """Return the id that must come next in this turn, None if the model chooses."""
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
        positions = self._cursors[self._lane].text(1)
        at = self.log.append(
            [token],
            kind,
            positions,
            turn=self.turn,
            version=version,
            lane=self._lane,
            sampled=sampled,
            target=target,
            logp=logp,
        )
        self._wrote.append((token, kind))
        text = kind in GENERATED_TEXT
        ordinal = self.generated if text else -1
        self.held.append(at, [token], positions, kind=kind, turn=self.turn, ordinal=ordinal, lane=self._lane)
        self.generated += text
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
                    self._cursors[1].offset = lane_one_start(self.policy, *(c.offset for c in self._cursors))
            cursor = self._cursors[part.lane]
            positions = cursor.text(len(part.ids)) if part.grid is None else cursor.video(part.grid, part.keep)
            at = self.log.append(part.ids, part.kind, positions, turn=turn, version=version, lane=part.lane)
            self.held.append(at, part.ids, positions, kind=part.kind, turn=turn, lane=part.lane)

    def _remember(self, version: int) -> None:
        """Append the copy of the turn before to that turn. The eviction for the turn that begins comes first."""
        if self.policy.lanes is not Lanes.MEMORY or not self._wrote:
            return
        ids, kinds = np.asarray(self._wrote, np.int32).T
        copy = self.layout.memory(ids, kinds, self._span)
        if copy is not None:
            self._append([copy], self.turn - 1, version)

    def _evict(self, chunk: ChunkRecord | None) -> np.ndarray:
        """Evict the tokens that the policy names; return their log indices."""
        start = self.history.begin(
            has_video=chunk is not None,
            video_tokens=0 if chunk is None else chunk.num_tokens,
            generated=self.generated,
        )
        leaving = evicted(self.policy, self.held.tokens(), start).mask(len(self.held))
        left = self.held.drop(leaving)
        self.log.expire(left)
        if self.regions is not None:
            before = self.regions.leave(~leaving)
            self.regions.move(self.live, placed(self.policy, self.held.tokens(), start, before), self.log.length)
        return left

"""StreamWriter: writes one stream's log, turn by turn; the one place where layout, memory and positions meet.

The rollout engine drives it with sampled tokens, SFT with demonstrated ones: both write the same log.

Invariants:
* the order inside a turn is eviction, prefill, generation, END, and END belongs to its own turn's segment;
* a turn starts at its first prefilled token;
* eviction happens only between segments, and a lane change starts a new segment;
* with two lanes, the copy of a turn is written when the next turn begins, after that turn's eviction;
* a query is closed by a turn that chose to respond, or by its `until` turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from streams.layout.lanes import Lanes, Span
from streams.layout.layout import Layout
from streams.layout.runs import Run, joined, runs_of
from streams.layout.turn_state import TurnState
from streams.log.builder import LogBuilder
from streams.log.record import ChunkRecord, LogHeader, StreamLog
from streams.memory import CONTIGUOUS, MemoryPolicy, check_text_tells_time, evicted, lane_one_start, placed
from streams.memory.live import LiveSet, TurnHistory
from streams.memory.rows import Rows
from streams.positions.mrope import PositionCursor
from streams.positions.regions import RegionBook


@dataclass(frozen=True)
class QueryInput:
    """A query as token ids. until_turn: the turn that closes it; None if a response does, NEVER if nothing does."""

    ids: tuple[int, ...]
    until_turn: int | None = None


@dataclass(frozen=True)
class TurnInput:
    """What one turn shows: a chunk of video, a query, both, or neither. span: the time that the turn's copy tells."""

    chunk: ChunkRecord | None
    query: QueryInput | None = None
    span: Span | None = None


class Begun(NamedTuple):
    """What a turn has begun with.

    Attributes:
        rows: what was evicted, among the tokens that were live.
        prefill: of the log; a preceding copy is no part of it.
    """

    rows: Rows
    prefill: slice


def check_timestamps_kept(layout: Layout, policy: MemoryPolicy) -> None:
    """Raise ValueError if text would be evicted before the video whose time it tells."""
    check_text_tells_time(policy, layout.timestamps)


@dataclass
class StreamWriter:
    """Writes the log of one stream.

    Attributes:
        positions: the position counter of lane 0; lane 1 has one of its own.
        held: the live tokens.
        history: what earlier turns were, for policies that ask.
        turn: index of the running turn, -1 before the first.
        generated: generated text tokens so far.
        state: state of the running turn, None before the first.
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
    # The running turn: the lane in which generation continues, its time, and with two lanes the ids and kinds it generated.
    _lane: int = 0
    _span: Span | None = None
    _wrote: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_timestamps_kept(self.layout, self.policy)
        self._cursors = (self.positions, replace(self.positions))
        contiguous = self.policy.positions == CONTIGUOUS
        self.log = LogBuilder(self.header, RegionBook() if contiguous else None)

    @property
    def regions(self) -> RegionBook | None:
        """The contiguous positions of the live tokens; None if positions are native."""
        return self.log.regions

    @property
    def live(self) -> np.ndarray:
        """Log indices int32 [n] of the live tokens, ascending."""
        return self.held.column("index")

    @property
    def next_position(self) -> int:
        """The position id of the next generated token."""
        return self._cursors[self._lane].offset

    def begin_turn(self, turn_input: TurnInput, version: int) -> Begun:
        """Evict, then append the prefill. version: of the weights that will forward it.

        Raises ValueError if the policy answers something that it may not.
        """
        assert self.state is None or self.state.over, "the turn before has not ended"
        if self.state is not None and self.state.spoke:
            self.history.answered()
        self.turn += 1
        chunk, query = turn_input.chunk, turn_input.query
        rows = self._evict(chunk)
        self._remember(version)
        start = self.log.length
        asked = None if query is None else list(query.ids)
        self._append(self.layout.runs(chunk, asked, self.policy.lanes, first=self.turn == 0), self.turn, version)
        if self.regions is not None:
            self.regions.settle(self.live, self.held.column("position"))
        self._span = turn_input.span
        if chunk is not None:
            self.log.add_chunk(chunk)
        if query is not None:
            self.history.ask(query.until_turn)
        self.state = TurnState(self.layout.tokens, self.layout.config)
        self._generation_begun = False
        return Begun(rows, slice(start, self.log.length))

    def forced(self) -> int | None:
        """Return the id that must come next in this turn, None if the model chooses."""
        assert self.state is not None
        return self.state.forced()

    def extend_generated(
        self,
        ids: np.ndarray | Sequence[int],
        version: int,
        *,
        logps: np.ndarray | None = None,
        target: np.ndarray | bool = False,
    ) -> np.ndarray:
        """Append the next generated tokens of the running turn, ids int [n], and return their kinds, int8 [n].

        Args:
            version: of the weights that sampled them.
            logps: float64 [n], the log-prob under which each was sampled, in nats, NaN for a forced one; None: none was
                sampled. Arrays are kept, ids of int32 too, and must not be written any more.
            target: bool [n], or one for all: they are trained on.
        """
        assert self.state is not None
        if not self._generation_begun:
            self.log.begin_segment()
            self._generation_begun = True
        ids = np.asarray(ids, np.int32)
        said = bytes(self.state.advance(ids.tolist()))
        kinds = np.frombuffer(said, np.int8)
        count = len(said)
        positions = self._cursors[self._lane].text(count)
        at = self.log.append(
            ids,
            kinds,
            positions,
            turn=self.turn,
            version=version,
            lane=self._lane,
            target=target,
            logp=logps,
        )
        self.held.append(
            at.start, ids, positions, runs_of(said), turn=self.turn, ordinal=self.generated, lane=self._lane
        )
        # END, which comes last, is no text.
        self.generated += count - self.state.over
        if self.policy.lanes is Lanes.MEMORY:
            self._wrote.append((ids, kinds))
        return kinds

    def finish(self) -> StreamLog:
        """Return the whole log."""
        return self.log.finish()

    def _append(self, runs: Sequence[Run], turn: int, version: int) -> None:
        """Append runs of one turn, each a segment of its own."""
        for run in runs:
            self.log.begin_segment()
            lane = self._lane = run.lane
            if lane == 1:
                self._cursors[1].offset = lane_one_start(self.policy, *(c.offset for c in self._cursors))
            positions = self._cursors[lane].run(run.shapes)
            at = self.log.append(run.ids, run.kinds, positions, turn=turn, version=version, lane=lane)
            self.held.append(at.start, run.ids, positions, run.of_kind, turn=turn, lane=lane)

    def _remember(self, version: int) -> None:
        """Append the copy of the turn before, to that turn. What left for the turn that begins has left before it."""
        if not self._wrote:
            return
        ids, kinds = (np.concatenate(column) for column in zip(*self._wrote, strict=True))
        self._wrote.clear()
        copy = self.layout.memory(ids, kinds, self._span)
        if copy is not None:
            self._append(joined([copy]), self.turn - 1, version)

    def _evict(self, chunk: ChunkRecord | None) -> Rows:
        """Evict the tokens that the policy names; returns their rows among the live tokens."""
        start = self.history.begin(
            has_video=chunk is not None,
            video_tokens=0 if chunk is None else chunk.num_tokens,
            generated=self.generated,
        )
        rows = evicted(self.policy, self.held.tokens(), start)
        count = len(self.held)
        self.log.expire(self.held.drop(rows))
        if self.regions is not None:
            before = self.regions.leave(~rows.mask(count))
            self.regions.move(self.live, placed(self.policy, self.held.tokens(), start, before), self.log.length)
        return rows

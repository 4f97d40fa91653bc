"""The writer by its definition: one token at a time, with lists and Python's numbers and none of the writer's code.

It asks the policy what leaves and for its regions, and nothing else. `tests/streams/test_policies.py` has the policies'
own definitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from streams.layout.lanes import head
from streams.layout.layout import Layout
from streams.log.record import GENERATED_TEXT, NEVER, ChunkRecord, Kind, LogHeader, StreamLog
from streams.memory import CONTIGUOUS, Lanes, LiveTokens, MemoryPolicy, Rows, TurnStart
from streams.positions.regions import Region, RegionLog
from streams.writing.writer import TurnInput

Cell = tuple[int, int, int]


@dataclass
class Token:
    """One token: a row of the log, and what is remembered of it while it is live."""

    id: int
    kind: Kind
    turn: int
    segment: int
    lane: int
    position: Cell
    version: int
    index: int
    sampled: bool = False
    target: bool = False
    logp: float = math.nan
    expiry: int = NEVER
    ordinal: int = -1
    region: Region = Region.RETAINED
    coordinate: int = 0
    stands: int | None = None


@dataclass
class PlainWriter:
    """Writes a stream as StreamWriter does; its positions are Qwen3-VL's if the layout writes times, Qwen2.5-VL's otherwise."""

    header: LogHeader
    layout: Layout
    policy: MemoryPolicy
    tokens_per_second: float
    patch_seconds: float
    tokens: list[Token] = field(default_factory=list)
    live: list[Token] = field(default_factory=list)
    turned: list[tuple[int, int]] = field(default_factory=list)
    turn: int = -1

    def __post_init__(self) -> None:
        self.counter = [0, 0]
        self.segment, self.lane = -1, 0
        self.spoken = self.shown = 0
        self.said: list[tuple[int, Kind]] = []
        self.span = None
        self.chunks: list[ChunkRecord] = []
        self.video_turns: list[int] = []
        self.generated: list[int] = []
        self.closed_in: list[int] = []
        self.open: list[int] = []
        self.moves: list[tuple[int, int, int, int]] = []
        self.offsets: list[list[int]] = []

    # A turn begins.

    def begin_turn(self, shown: TurnInput, version: int) -> list[int]:
        """Begin a turn. Returns the log indices that were evicted."""
        t = self.layout.tokens
        if (t.response, Kind.DECISION) in self.said:
            for turn in self.open:
                self.closed_in[turn] = self.turn
            self.open = []
        self.turn += 1
        left = self._evict(shown.chunk)
        if self.policy.lanes is Lanes.MEMORY and self.turn:
            copy = self._copy()
            self._lane_begins(0, bool(copy))
            for token in copy:
                self._text(token, Kind.MEMORY, version, turn=self.turn - 1)
        self._prefill(shown, version)
        if self.policy.positions == CONTIGUOUS:
            self._settle()
        if shown.chunk is not None:
            self.chunks.append(shown.chunk)
            self.shown += 1
        if shown.query is not None:
            if shown.query.until_turn is None:
                self.open.append(self.turn)
            else:
                self.closed_in[self.turn] = shown.query.until_turn
        self.span, self.said = shown.span, []
        return left

    def _evict(self, chunk: ChunkRecord | None) -> list[int]:
        self.video_turns.append(self.shown)
        self.generated.append(self.spoken)
        start = TurnStart(
            self.turn,
            chunk is not None,
            0 if chunk is None else chunk.num_tokens,
            np.array(self.video_turns),
            np.array(self.generated),
            np.array(self.closed_in, np.int64),
        )
        self.closed_in.append(NEVER)
        leaving = self.policy.leaving(self._seen(), start)
        if isinstance(leaving, Rows):
            leaving = leaving.mask(len(self.live))
        left = []
        for token, leaves in list(zip(self.live, leaving, strict=True)):
            if leaves and not (token.kind == Kind.QUERY and self.closed_in[token.turn] >= self.turn):
                token.expiry = len(self.tokens)
                left.append(token.index)
        self.live = [token for token in self.live if token.expiry == NEVER]
        if self.policy.positions == CONTIGUOUS:
            self._move(self.policy.regions(self._seen(), start))
        return left

    def _seen(self) -> LiveTokens:
        def column(values: list[int], dtype: type) -> np.ndarray:
            return np.array(values, dtype)

        return LiveTokens(
            column([token.kind for token in self.live], np.int8),
            column([token.turn for token in self.live], np.int32),
            column([token.id for token in self.live], np.int32),
            column([token.index for token in self.live], np.int64),
            column([token.ordinal for token in self.live], np.int64),
        )

    def _copy(self) -> list[int]:
        t, encode = self.layout.tokens, self.layout.tokenizer.encode
        control = {*self.layout.tokenizer.added_tokens_decoder, *self.layout.banned}
        thought = [i for i, kind in self.said if kind == Kind.THINK and i not in control]
        answer = [i for i, kind in self.said if kind == Kind.RESPONSE and i not in control]
        if (t.response, Kind.DECISION) not in self.said:
            answer = []
        if not thought and not answer:
            return []
        return [*encode(head(self.span)), *thought, *(encode("\n[said]\n") if answer else []), *answer]

    def _prefill(self, shown: TurnInput, version: int) -> None:
        t, encode = self.layout.tokens, self.layout.tokenizer.encode
        two = self.policy.lanes is Lanes.MEMORY
        query = [] if shown.query is None else list(shown.query.ids)
        if query and (two or shown.chunk is not None):
            query = [*encode("\n"), *query]
        self._lane_begins(0, not two or self.turn == 0 or bool(query))
        if self.turn == 0:
            for token in self.layout.system_ids:
                self._text(token, Kind.SYSTEM, version)
        if two:
            for token in query:
                self._text(token, Kind.QUERY, version)
            self._lane_begins(1, True)
        for token in [*encode("\n"), t.im_start, *encode("user\n")]:
            self._text(token, Kind.SCAFFOLD, version)
        if shown.chunk is not None:
            self._video(shown.chunk, version)
        for token in [] if two else query:
            self._text(token, Kind.QUERY, version)
        for token in [t.im_end, *encode("\n"), t.im_start, *encode("assistant\n")]:
            self._text(token, Kind.SCAFFOLD, version)

    def _lane_begins(self, lane: int, anything: bool) -> None:
        if not anything:
            return
        self.segment, self.lane = self.segment + 1, lane
        if lane == 1:
            self.counter[1] = self.policy.lane_one_begins(*self.counter)

    def _video(self, chunk: ChunkRecord, version: int) -> None:
        """Append every cell in order; a block is the chunk, or one of its patches if the text has times."""
        t, (patches, height, width) = self.layout.tokens, chunk.grid
        timed = self.layout.timestamps
        for block in range(patches) if timed else [None]:
            if timed:
                for token in self.layout.tokenizer.encode(f"<{chunk.patch_times[block]:.1f} seconds>"):
                    self._text(token, Kind.SCAFFOLD, version)
            self._text(t.vision_start, Kind.SCAFFOLD, version)
            begin = self.counter[self.lane]
            last = begin
            for patch in range(patches) if block is None else [block]:
                # 1e-9 as in the writer's rule: rounding must not take a whole product below its whole number.
                temporal = 0 if timed else math.floor(patch * self.patch_seconds * self.tokens_per_second + 1e-9)
                for row in range(height):
                    for column in range(width):
                        cell = (begin + temporal, begin + row, begin + column)
                        last = max(last, *cell)
                        if chunk.keep is None or (patch * height + row) * width + column in chunk.keep:
                            self._token(t.video_pad, Kind.VIDEO, cell, version)
            self.counter[self.lane] = last + 1
            self._text(t.vision_end, Kind.SCAFFOLD, version)

    # A turn goes on.

    def generate(self, token: int, version: int, logp: float = math.nan, target: bool = False) -> Kind:
        """Write one generated token; logp is NaN for a forced one."""
        if not self.said:
            self.segment += 1
        kind = self._kind(token)
        self._text(token, kind, version)
        self.said.append((token, kind))
        written = self.tokens[-1]
        written.sampled, written.logp, written.target = not math.isnan(logp), logp, target
        if kind in GENERATED_TEXT:
            written.ordinal = self.spoken
            self.spoken += 1
        return kind

    def _kind(self, token: int) -> Kind:
        t, before = self.layout.tokens, [i for i, _ in self.said]
        assert t.im_end not in before
        if token == t.im_end:
            return Kind.END
        if t.think_end not in before:
            return Kind.THINK
        first = before.index(t.think_end) == len(before) - 1
        return Kind.DECISION if first and token in (t.silent, t.response) else Kind.RESPONSE

    def _text(self, token: int, kind: Kind, version: int, turn: int | None = None) -> None:
        here = self.counter[self.lane]
        self.counter[self.lane] += 1
        self._token(token, kind, (here, here, here), version, turn)

    def _token(self, token: int, kind: Kind, position: Cell, version: int, turn: int | None = None) -> None:
        index, turn = len(self.tokens), self.turn if turn is None else turn
        self.tokens.append(Token(token, kind, turn, self.segment, self.lane, position, version, index))
        self.live.append(self.tokens[-1])

    # Contiguous positions.

    def _move(self, regions: np.ndarray) -> None:
        """Place tokens that enter a region after those that stay there."""
        entering = [(token, Region(int(r))) for token, r in zip(self.live, regions, strict=True)]
        staying = [token for token, r in entering if token.region == r]
        moving = [(token, r) for token, r in entering if token.region != r]
        free = {r: max((t.coordinate for t in staying if t.region == r), default=-1) + 1 for r in Region}
        for token, r in moving:
            token.region, token.coordinate, token.stands = r, free[r], None
            free[r] += 1
            self.moves.append((token.index, int(r), token.coordinate, len(self.tokens)))

    def _settle(self) -> None:
        native = next(min(token.position) for token in self.live if token.region == Region.RETAINED)
        offsets, extent = {}, 0
        for r in list(Region)[: Region.RETAINED]:
            here = [token.coordinate for token in self.live if token.region == r]
            if here:
                offsets[r] = (extent, min(here))
                extent += max(here) - min(here) + 1
        # What to add to a query's native position, so that subtracting a key's coordinate gives their distance.
        added = {r: extent - native - base + first for r, (base, first) in offsets.items()}
        self.offsets.append([added.get(r, 0) for r in list(Region)[: Region.RETAINED]])
        self.turned = []
        for token in self.live:
            if token.region != Region.RETAINED and token.stands != token.coordinate - added[token.region]:
                token.stands = token.coordinate - added[token.region]
                self.turned.append((token.index, token.stands))

    # The stream ends.

    def finish(self) -> StreamLog:
        """Return the whole log."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(token, name) for token in self.tokens], dtype)

        regions = None
        if self.policy.positions == CONTIGUOUS:
            moves = np.array(self.moves, np.int32).reshape(-1, 4).T
            offsets = np.array(self.offsets, np.int32).reshape(-1, 5)
            regions = RegionLog(moves[0], moves[1].astype(np.int8), moves[2], moves[3], offsets)
        return StreamLog(
            header=self.header,
            ids=column("id", np.int32),
            kind=column("kind", np.int8),
            turn=column("turn", np.int32),
            segment=column("segment", np.int32),
            lane=column("lane", np.int8),
            positions=column("position", np.int32).reshape(-1, 3).T,
            expiry=column("expiry", np.int32),
            sampled=column("sampled", np.bool_),
            target=column("target", np.bool_),
            behaviour_logp=column("logp", np.float64),
            version=column("version", np.int32),
            chunks=tuple(self.chunks),
            regions=regions,
        )

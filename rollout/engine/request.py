"""One stream: as it is requested, as it runs, and how it may fail.

Invariants:
* what a stream may hold (`bound`) is known before its first turn and never grows;
* a stream that begins anew is a new `Stream`, with a new writer: nothing of its former run is left;
* `forwarded` counts the log's tokens whose keys are in the pool; `slots` has those of them that are still visible.

Live streams only (`TurnFeed`, `pieces`, `StreamFailure`): no stage of a run uses them. They serve a program that drives an
engine by itself, as docs/memory.md shows and `benchmarks.endless` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rollout.engine.feed import KnownTurns, TurnFeed
from rollout.engine.slots import StreamSlots
from streams.layout.layout import Layout
from streams.log.pieces import PieceSink
from streams.log.record import LogHeader
from streams.memory import MemoryPolicy, live_bound
from streams.writing.writer import StreamWriter, TurnInput


@dataclass(frozen=True)
class StreamRequest:
    """A stream to run.

    Attributes:
        header: what its log begins with.
        turns: what it is shown. A sequence may make its items when they are indexed.
        features: one tensor [tokens, F] per chunk shown, in turn order, on the engine's device; F = Backbone.feature_width,
            one row per kept video token of the chunk. May also be made when indexed. Empty with a feed, which brings its own.
        policy: which tokens are evicted. Belongs to this stream alone.
        layout: the tokens of a turn.
        patch_seconds: time between two temporal patches, in seconds.
        pieces: where the log goes, piece by piece; None: it is kept, and returned whole.
        piece_tokens: the least length of a piece, in tokens; handed out between turns.
    """

    header: LogHeader
    turns: Sequence[TurnInput] | TurnFeed
    features: Sequence[torch.Tensor]
    policy: MemoryPolicy
    layout: Layout
    patch_seconds: float
    pieces: PieceSink | None = None
    piece_tokens: int = 4096

    def source(self) -> KnownTurns | TurnFeed:
        """Return what hands out the turns, once and in order."""
        return self.turns if isinstance(self.turns, TurnFeed) else KnownTurns(self.turns, self.features)


def stream_bound(request: StreamRequest) -> int:
    """Return the number of KV slots that a stream may hold at once."""
    sizes = request.source().sizes(request.layout, request.policy.lanes)
    return live_bound(
        request.policy,
        per_turn=sizes.scaffold + sizes.video + request.layout.config.max_new_tokens,
        fixed=len(request.layout.system_ids) + sizes.queries + sizes.copies,
        video_per_turn=sizes.video,
        turns=sizes.turns,
    )


def first_need(request: StreamRequest) -> int:
    """Return the number of KV slots that a stream takes in its first turn, at most; 0 where that is not known yet."""
    if isinstance(request.turns, TurnFeed) or not len(request.turns):
        return 0
    layout, turn = request.layout, request.turns[0]
    asked = None if turn.query is None else list(turn.query.ids)
    runs = layout.runs(turn.chunk, asked, request.policy.lanes, first=True)
    return sum(len(run.ids) for run in runs) + layout.config.max_new_tokens


@dataclass(frozen=True)
class StreamFailure:
    """A live stream that ended early, and why. The others ran on."""

    stream_id: str
    cause: str


# Compared by identity: two running streams are never the same one.
@dataclass(eq=False)
class Stream:
    """A stream that waits or runs.

    Attributes:
        bound: KV slots that it may hold at once.
        need: KV slots that must be free before it begins.
        peak: the most KV slots that a turn of it has needed so far.
        number: its place among all that came.
        slots: the slots of its forwarded tokens that are still visible; set when it is admitted.
        forwarded: the log index of the first token that was not forwarded yet.
        failure: why it cannot go on; empty while it can.
        contiguous: its positions are contiguous, so that the engine rotates its keys.
        greedy: it takes the largest logit.
        constants: what the decoder is told of it, the same in every turn: the last of its fields.
    """

    request: StreamRequest
    writer: StreamWriter
    source: KnownTurns | TurnFeed
    bound: int
    need: int
    peak: int = 0
    number: int = 0
    slots: StreamSlots = field(init=False)
    forwarded: int = 0
    failure: str = ""
    contiguous: bool = field(init=False)
    greedy: bool = field(init=False)
    constants: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.contiguous = self.writer.regions is not None
        header, config = self.request.header, self.request.layout.config
        self.greedy = header.temperature == 0
        self.constants = (config.think_budget, config.max_new_tokens, header.seed, self.greedy, self.contiguous)

    @property
    def id(self) -> str:
        return self.request.header.stream_id

    @property
    def keeps(self) -> bool:
        """Whether it cannot begin anew: its turns are taken from a feed, or parts of its log are out of the house."""
        return isinstance(self.source, TurnFeed) or self.request.pieces is not None

    @property
    def between_turns(self) -> bool:
        """Whether no turn has begun, or the last one that has is over."""
        return self.writer.state is None or self.writer.state.over

    @property
    def finished(self) -> bool:
        return self.between_turns and self.source.ended

    @property
    def idle(self) -> bool:
        """Whether this is a live stream whose next turn has not come."""
        return self.between_turns and not self.source.ready and not self.source.ended

    @property
    def ahead(self) -> int:
        """How many tokens its running turn may still generate."""
        assert self.writer.state is not None
        return self.request.layout.config.max_new_tokens - self.writer.state.count

    def write_piece(self) -> None:
        """Hand out the log up to `forwarded` once that is long enough, or all of it at the end; nothing without a sink.

        Between two turns. A sink that cannot take the piece ends the stream.
        """
        sink, log = self.request.pieces, self.writer.log
        if sink is None or not (self.finished or self.forwarded - log.first >= self.request.piece_tokens):
            return
        # Tokens that are not forwarded stay in the log: the step that forwards them reads them there.
        piece = log.cut(log.length, last=True) if self.finished else log.cut(self.forwarded)
        try:
            sink.write(piece)
        except OSError as error:  # named boundary: one stream's log
            self.failure = f"piece {piece.number} of its log could not be written: {type(error).__name__}: {error}"

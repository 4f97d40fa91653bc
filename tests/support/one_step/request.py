"""One stream as it runs. What is requested, and how it hands out turns, is the engine's own (rollout.engine).

Invariants:
* what a stream may hold (`reserved`) is known before its first turn and never grows;
* `forwarded` counts the log's tokens whose keys are in the pool; `slots` has those of them that are still visible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.engine.feed import KnownTurns, TurnFeed
from rollout.engine.request import StreamRequest
from streams.memory import live_bound
from tests.support.one_step.slots import SlotList
from tests.support.one_step.writer import StreamWriter


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


# Compared by identity: two running streams are never the same one.
@dataclass(eq=False)
class Stream:
    """A stream that waits or runs.

    Attributes:
        reserved: KV slots that no other stream may count on.
        slots: the slots of its forwarded tokens that are still visible.
        forwarded: the log index of the first token that was not forwarded yet.
        failure: why it cannot go on; empty while it can.
    """

    request: StreamRequest
    writer: StreamWriter
    source: KnownTurns | TurnFeed
    reserved: int
    slots: SlotList = field(default_factory=SlotList)
    forwarded: int = 0
    failure: str = ""

    @property
    def id(self) -> str:
        return self.request.header.stream_id

    @property
    def between_turns(self) -> bool:
        """Return whether no turn has begun, or the latest is over."""
        return self.writer.state is None or self.writer.state.over

    @property
    def finished(self) -> bool:
        return self.between_turns and self.source.ended

    @property
    def idle(self) -> bool:
        """Return whether this is a live stream whose next turn has not come."""
        return self.between_turns and not self.source.ready and not self.source.ended

    @property
    def contiguous(self) -> bool:
        """Return whether its positions are contiguous, so that the engine rotates its keys."""
        return self.writer.regions is not None

    def write_piece(self) -> None:
        """Hand out the log up to `forwarded` once that is long enough, or all of it at the end; nothing without a sink.

        A sink that cannot take the piece ends the stream.
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

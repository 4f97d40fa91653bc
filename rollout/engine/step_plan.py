"""What a visit forwards before it decodes: a packed row of turns that end and of turns that begin, stream by stream.

Invariants:
* END, as any token not yet forwarded, attends over its own turn's slots: it is in a part of its own, before the part of the
  turns that begin, and before any key moves;
* slots freed here are only collected: they may be given out again only after this row's forward;
* every segment ends with its own tokens' slots (see `rollout.attention.segments`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from rollout.attention.segments import Segment
from rollout.engine.contiguous import MovedKeys
from rollout.engine.request import Stream
from streams.layout.lanes import Lanes
from streams.log.record import Kind


@dataclass
class Part:
    """Rows that follow one another. The lists hold one item per stream, `segments` one per run of a lane.

    Attributes:
        ids: int32 [n] each. positions: native ones, int32 [3, n] each. slots: int64 [n] each.
        contiguous: whether the engine rotates the stream's rows.
    """

    rows: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    slots: list[np.ndarray] = field(default_factory=list)
    contiguous: list[bool] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, stream: Stream) -> None:
        """Append all logged tokens of a stream that are not forwarded."""
        log = stream.writer.log
        start, stop = stream.forwarded, log.length
        self.slots.append(stream.slots.add(start, stop - start))
        self.ids.append(log.column("ids", start))
        self.positions.append(log.positions_between(start, stop))
        self.contiguous.append(stream.contiguous)
        # A segment sees one set of slots, and lanes see different ones: cut wherever the lane changes.
        cuts: list[int] = []
        if stream.writer.policy.lanes is not Lanes.ONE:
            cuts = (np.flatnonzero(np.diff(log.column("lane", start))) + start + 1).tolist()
        for begin, end in pairwise([start, *cuts, stop]):
            self.segments.append(Segment(self.rows, end - begin, _seen(stream, begin, end)))
            self.rows += end - begin
        stream.forwarded = stop


class StepPlan:
    """The row of one forward.

    Attributes:
        ends: what turns that are over have left to forward. turns: the prefill of those that begin, in the row behind `ends`.
        video: indices in `turns` of the tokens that show a chunk, int64 [n] each; features: [n, F] each, in the same order.
        freed: slots to give back after the forward, by stream.
        moved_from, moved_to: keys that move to other slots between the two parts, int64 [n] each.
        moved_keys: keys that get other positions then.
        choosing: the streams that sample a token, with the index in `turns` of the hidden state they sample from.
    """

    def __init__(self, version: int) -> None:
        """version: of the weights that the forward runs on."""
        self._version = version
        self.ends, self.turns = Part(), Part()
        self.video: list[np.ndarray] = []
        self.features: list[torch.Tensor] = []
        self.freed: list[tuple[Stream, np.ndarray]] = []
        self.moved_from: list[np.ndarray] = []
        self.moved_to: list[np.ndarray] = []
        self.moved_keys = MovedKeys()
        self.choosing: list[tuple[Stream, int]] = []

    @property
    def rows(self) -> int:
        return self.ends.rows + self.turns.rows

    @property
    def contiguous(self) -> bool:
        return any(self.turns.contiguous)

    def gather(self, stream: Stream) -> None:
        """End the turn of a stream and begin its next one, which must be ready; a stream that its source refuses fails."""
        queries = int(np.count_nonzero(stream.writer.held.column("kind") == Kind.QUERY))
        stream.failure = stream.source.refuses(queries)
        if stream.failure:
            return
        self._end_turn(stream)
        self._begin_turn(stream)
        self.turns.add(stream)
        self.choosing.append((stream, self.turns.rows - 1))

    def _end_turn(self, stream: Stream) -> None:
        """Append what the turn that is over has left to forward: now, as END still sees what the next turn evicts."""
        if stream.forwarded < stream.writer.log.length:
            self.ends.add(stream)

    def _begin_turn(self, stream: Stream) -> None:
        """Evict, and log the next turn's prefill and the forced tokens behind it."""
        writer = stream.writer
        start = stream.forwarded
        turn_input, features = stream.source.take()
        evicted, _ = writer.begin_turn(turn_input, self._version)
        if features is not None:
            # The prefill's segments are the next to be added.
            video = np.flatnonzero(writer.log.column("kind", start) == Kind.VIDEO)
            self.video.append(self.turns.rows + video)
            self.features.append(features)
        while (token := writer.forced()) is not None:
            writer.extend_generated([token], self._version)
        # What is evicted counts, too: its slots are not free before this row's forward.
        held, live = len(writer.held) + len(evicted), len(writer.held) + stream.ahead
        if max(held, live) > stream.reserved:  # slots that other streams were promised
            raise ValueError(
                f"stream {stream.id}: memory {stream.request.header.memory} may hold {max(held, live)} tokens in "
                f"turn {writer.turn}, more than its max_live_tokens said ({stream.reserved}): correct that bound"
            )
        dropped = stream.slots.drop(evicted, writer.log.length - start)
        if len(dropped.freed):
            self.freed.append((stream, dropped.freed))
        if len(dropped.source):
            self.moved_from.append(dropped.source)
            self.moved_to.append(dropped.target)
        if writer.regions is not None:
            moved, positions = writer.regions.turned
            self.moved_keys.move(stream.slots.of(moved), positions)


def _seen(stream: Stream, begin: int, end: int) -> np.ndarray:
    """Slots int64 [n] that the segment [begin, end) of one lane attends to, its own included: live, of its lane or below."""
    held = stream.writer.held
    # `held` and `slots` both list the live tokens in log order. What is logged behind this segment is not for it to see.
    seen = slice(0, int(np.searchsorted(held.column("index"), end)))
    # A view that stays as it is when the next turn drops slots: END keeps seeing what its turn saw.
    slots = stream.slots.held[seen]
    if stream.writer.policy.lanes is Lanes.ONE:
        return slots
    return slots[held.column("lane")[seen] <= stream.writer.log.column("lane", begin)[0]]

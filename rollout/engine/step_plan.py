"""What a visit forwards before it decodes: a packed row of turns that end and of turns that begin, stream by stream.

Invariants:
* END, as any token not yet forwarded, attends over its own turn's slots: it is in a part of its own, before the part of the
  turns that begin, and before any key moves;
* slots freed here are only collected: they may be given out again only after this row's forward;
* a first turn with the prefill of one that is in the row already is not forwarded: it shares that one's keys, and samples
  from its hidden state;
* every segment ends with its own tokens' slots (see `rollout.attention.segments`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from rollout.attention.segments import Segment
from rollout.engine.contiguous import MovedKeys
from rollout.engine.request import Stream
from streams.layout.lanes import Lanes
from streams.log.record import Kind
from streams.memory.rows import Rows

_VIDEO = int(Kind.VIDEO)  # numpy takes members of an IntEnum, but several times as long as plain numbers


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
        slots = stream.slots
        self.slots.append(slots.add(stop - start))
        self.ids.append(log.column("ids", start))
        self.positions.append(log.column("positions", start))
        self.contiguous.append(stream.contiguous)
        stream.forwarded = stop
        if stream.writer.policy.lanes is Lanes.ONE:
            # A view that stays as it is when the next turn drops slots: END keeps seeing what its turn saw.
            self.segments.append(Segment(self.rows, stop - start, slots.held, slots.range))
            self.rows += stop - start
            return
        # A segment sees one set of slots, and lanes see different ones: cut wherever the lane changes.
        cuts = (np.flatnonzero(np.diff(log.column("lane", start))) + start + 1).tolist()
        for begin, end in pairwise([start, *cuts, stop]):
            self.segments.append(Segment(self.rows, end - begin, _seen(stream, begin, end)))
            self.rows += end - begin


class Opened(NamedTuple):
    """A turn that its stream's log has begun, and that has no slots yet.

    Attributes:
        evicted: rows of what left, among the live tokens before.
        start: log index of its first token that is not forwarded; coming: how many there are.
        features: its chunk's, None without one.
        prefix: what its prefill is: a turn with the same one has the same keys. None: not to be shared.
    """

    stream: Stream
    evicted: Rows
    start: int
    coming: int
    features: torch.Tensor | None
    prefix: Hashable | None


class StepPlan:
    """The row of one forward.

    Attributes:
        ends: what turns that are over have left to forward. turns: the prefill of those that begin, in the row behind `ends`.
        video: indices in `turns` of the tokens that show a chunk, int64 [n] each; features: [n, F] each, in the same order.
        freed: slots to give back after the forward, by stream.
        moved_from, moved_to: keys that move to other slots between the two parts, int64 [n] each.
        moved_keys: keys that get other positions then.
        copies: keys of shared prefills, from slots to slots once the row is forwarded, int64 [n] each.
        shared: tokens whose forward was saved so.
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
        self.copies: list[tuple[np.ndarray, np.ndarray]] = []
        self.shared = 0
        self.choosing: list[tuple[Stream, int]] = []
        # Prefills that others may share: their stream, and the row they sample from.
        self._leaders: dict[Hashable, tuple[Stream, int]] = {}

    @property
    def rows(self) -> int:
        return self.ends.rows + self.turns.rows

    @property
    def contiguous(self) -> bool:
        return any(self.turns.contiguous)

    def open(self, stream: Stream) -> Opened | None:
        """End the turn of a stream and begin its next one, which must be ready, in its log.

        Returns None if its source refuses the turn: the stream fails.
        """
        stream.failure = stream.source.refuses(stream.writer.held)
        if stream.failure:
            return None
        self._end_turn(stream)
        return self._begin_turn(stream)

    def leads(self, turn: Opened) -> bool:
        """Whether the row has the prefill of this turn already, from another stream."""
        return turn.prefix in self._leaders

    def has_room(self, turn: Opened) -> bool:
        """Whether there are slots for a turn beside what is planned."""
        coming = 0 if self.leads(turn) and not _copies(turn.stream) else turn.coming
        return turn.stream.slots.has_room(coming, turn.evicted, turn.stream.ahead)

    def place(self, turn: Opened) -> None:
        """Give the prefill of a turn slots, and append it to the row or share that of another stream."""
        stream, log = turn.stream, turn.stream.writer.log
        dropped = stream.slots.drop(turn.evicted, turn.coming)
        if len(dropped.freed):
            self.freed.append((stream, dropped.freed))
        if len(dropped.source):
            self.moved_from.append(dropped.source)
            self.moved_to.append(dropped.target)
        if stream.writer.regions is not None:
            moved, positions = stream.writer.regions.turned
            # Every live token before the prefill has a slot, so the rows of both are the same.
            self.moved_keys.move(stream.slots.held[np.searchsorted(stream.writer.live, moved)], positions)
        if self.leads(turn):
            self._share(turn)
        else:
            if turn.features is not None:
                video = (log.column("kind", turn.start) == _VIDEO).nonzero()[0]
                self.video.append(self.turns.rows + video)
                self.features.append(turn.features)
            self.turns.add(stream)
            self.choosing.append((stream, self.turns.rows - 1))
            if turn.prefix is not None:
                self._leaders[turn.prefix] = self.choosing[-1]
        stream.slots.expect(stream.ahead)

    def _share(self, turn: Opened) -> None:
        """Hold the keys that the leader's prefill writes, and sample from its hidden state."""
        leader, row = self._leaders[turn.prefix]
        stream = turn.stream
        copied = stream.slots.share(leader.slots, turn.coming, copy=_copies(stream))
        if len(copied[0]):
            self.copies.append(copied)
        self.shared += turn.coming
        self.choosing.append((stream, row))
        stream.forwarded = turn.start + turn.coming

    def _end_turn(self, stream: Stream) -> None:
        """Append what the turn that is over has left to forward: now, as END still sees what the next turn evicts."""
        if stream.forwarded < stream.writer.log.length:
            self.ends.add(stream)

    def _begin_turn(self, stream: Stream) -> Opened:
        """Evict, and log the next turn's prefill and the forced tokens behind it."""
        writer = stream.writer
        start = stream.forwarded
        turn_input, features = stream.source.take()
        evicted = writer.begin_turn(turn_input, self._version).rows
        while (token := writer.forced()) is not None:
            writer.extend_generated([token], self._version)
        # What is evicted counts, too: its slots are not free before this row's forward.
        most = len(writer.held) + max(evicted.count, stream.ahead)
        stream.peak = max(stream.peak, most)
        if most > stream.bound:  # more than the pool may have for it
            raise ValueError(
                f"stream {stream.id}: memory {stream.request.header.memory} may hold {most} tokens in "
                f"turn {writer.turn}, more than its max_live_tokens said ({stream.bound}): correct that bound"
            )
        # What a stream keeps must come back when it drops it: it shares with nobody.
        prefix = _prefix(stream, features) if writer.turn == 0 and not stream.keeps else None
        return Opened(stream, evicted, start, writer.log.length - start, features, prefix)


def _copies(stream: Stream) -> bool:
    """Whether a stream that shares a prefill needs keys of its own: its later turns rotate them anew."""
    return stream.contiguous


def _prefix(stream: Stream, features: torch.Tensor | None) -> Hashable:
    """Return what the keys of a stream's first prefill depend on: ids, positions, lanes, and the very same features."""
    log = stream.writer.log
    shown = None
    if features is not None:
        # By place and shape: two that are alive in one place are one.
        shown = (features.data_ptr(), features.shape, features.stride(), features.dtype)
    columns = tuple(log.column(name).tobytes() for name in ("ids", "kind", "lane", "positions"))
    return (*columns, stream.contiguous, shown)


def _seen(stream: Stream, begin: int, end: int) -> np.ndarray:
    """Slots int64 [n] that the segment [begin, end) of one lane attends to, its own included: live, of its lane or below."""
    slots, held = stream.slots.held, stream.writer.held
    # What is logged behind this segment is not for it to see.
    seen = slice(0, int(held.column("index").searchsorted(np.int32(end))))
    return slots[seen][held.column("lane")[seen] <= stream.writer.log.column("lane", begin)[0]]

"""What one step forwards: a packed row, gathered stream by stream.

A running stream adds its next decode token, or the end of one turn and the prefill of the next.

Invariants:
* END, as any token not yet forwarded, attends over its own turn's slots: its segment is made before the next turn evicts;
* with contiguous positions END has a step of its own;
* slots freed here are only collected: they may be reused only after this row's forward;
* every segment ends with its own tokens' slots (see `rollout.attention.segments`).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from streams.layout.lanes import Lanes
from streams.log.record import Kind
from tests.support.one_step.contiguous import StepRotation
from tests.support.one_step.kv_pool import KVPool
from tests.support.one_step.request import Stream
from tests.support.one_step.torch_sdpa import Segment


class StepPlan:
    """The row of one step. The lists hold one item per segment, or per turn that begins.

    Attributes:
        rows: tokens of the row so far.
        ids: int64 [n] each; positions: [3, n] each, those that transformers rotates by; new_slots: int64 [n] each.
        segments: who attends to which slots.
        video: indices in the row of the tokens that show a chunk, int64 [n] each; features: [n, F] each, in the same order.
        freed: slots to free after the forward.
        choosing: the streams that sample a token, with the index in the row of the hidden state they sample from.
        rotation: what the step rotates itself, for streams with contiguous positions.
    """

    def __init__(self, pool: KVPool, version: int) -> None:
        """version: of the weights that the step runs on."""
        self._pool, self._version = pool, version
        self.rows = 0
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.new_slots: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.video: list[np.ndarray] = []
        self.features: list[torch.Tensor] = []
        self.freed: list[np.ndarray] = []
        self.choosing: list[tuple[Stream, int]] = []
        self.rotation = StepRotation()

    def gather(self, stream: Stream) -> None:
        """Append what `stream` forwards next; nothing if it waits for a turn, or fails."""
        if stream.between_turns and not self._next_turn(stream):
            return
        state = stream.writer.state
        assert state is not None
        # Forced tokens need no logits: all of them, and the sampled one before them, are forwarded together.
        while (token := stream.writer.forced()) is not None and not state.over:
            stream.writer.append_generated(token, self._version)
        # Nobody attends to the last turn's END, so it is never forwarded.
        if stream.finished:
            return
        self._add_segments(stream)
        if not state.over:
            self.choosing.append((stream, self.rows - 1))

    def _next_turn(self, stream: Stream) -> bool:
        """End the turn that is over and begin the next one; False if that has to wait, or fails."""
        if not stream.source.ready:
            return False
        stream.failure = stream.source.refuses(stream.writer.held)
        if stream.failure or not self._end_turn(stream):
            return False
        self._begin_turn(stream)
        return True

    def _end_turn(self, stream: Stream) -> bool:
        """Append what the turn that is over has left to forward (END); returns whether the next turn may begin in this step.

        Now and not with the next prefill: END still sees what the next turn evicts.
        """
        if stream.forwarded == stream.writer.log.length:
            return True
        self._add_segments(stream)
        # The next turn moves keys, and the pool has one rotation of each key a step. END must see them as they are.
        return not stream.contiguous

    def _begin_turn(self, stream: Stream) -> None:
        """Evict, and log the next turn's prefill."""
        writer = stream.writer
        turn_input, features = stream.source.take()
        evicted, _ = writer.begin_turn(turn_input, self._version)
        # What is evicted counts, too: END, in this same row, may still attend to it, so its slots are not free yet.
        held = len(writer.live) + len(evicted)
        if held > stream.reserved:  # slots that other streams were promised
            raise ValueError(
                f"stream {stream.id}: memory {stream.request.header.memory} holds {held} tokens in "
                f"turn {writer.turn}, more than its max_live_tokens said ({stream.reserved}): correct that bound"
            )
        # Dropped from the stream's list, but not freed: this row allocates, and a slot in use by END's segment would be
        # overwritten before END attends.
        self.freed.append(stream.slots.drop(evicted))
        if writer.regions is not None:
            moved, positions = writer.regions.turned
            self.rotation.move(stream.slots.of(moved), positions)
        if features is not None:
            # What is not forwarded yet is this prefill, and it starts at `rows`: its segments are the next to be added.
            video = np.flatnonzero(writer.log.column("kind", stream.forwarded) == Kind.VIDEO)
            self.video.append(self.rows + video)
            self.features.append(features)

    def _add_segments(self, stream: Stream) -> None:
        """Append all logged tokens that are not forwarded: one segment over the live slots, or one for every run of a lane."""
        log = stream.writer.log
        start, stop = stream.forwarded, log.length
        new = self._pool.allocate(stop - start)
        stream.slots.add(start, new)
        self.ids.append(log.column("ids", start).astype(np.int64))
        positions = log.positions_between(start, stop)
        self.positions.append(self.rotation.segment(positions, contiguous=stream.contiguous))
        self.new_slots.append(new)
        # A segment sees one set of slots, and lanes see different ones: cut wherever the lane changes.
        cuts = np.flatnonzero(np.diff(log.column("lane", start))) + start + 1
        for begin, end in pairwise([start, *cuts.tolist(), stop]):
            self.segments.append(Segment(self.rows, end - begin, _seen(stream, begin, end)))
            self.rows += end - begin
        stream.forwarded = stop


def _seen(stream: Stream, begin: int, end: int) -> np.ndarray:
    """Return slots int64 [n] that the segment [begin, end) of one lane attends to: live, of its lane or below, and its own."""
    held = stream.writer.held
    # `held` and `slots` both list the live tokens in log order. What is logged behind this segment is not for it to see.
    seen = slice(0, int(np.searchsorted(held.column("index"), end)))
    # A view that stays as it is when the next turn drops slots: END keeps seeing what its turn saw.
    slots = stream.slots.held[seen]
    if stream.writer.policy.lanes is Lanes.ONE:
        return slots
    return slots[held.column("lane")[seen] <= stream.writer.log.column("lane", begin)[0]]

"""The streaming engine: many streams at once, continuous batching, eviction by editing slot lists.

One `step` forwards, in one packed row, whatever every running stream has next: a decode token, or the
end of one turn and the prefill of the next. Invariants: END (and any token not yet forwarded) goes through under its
own turn's slot list before the next turn's eviction takes effect (with contiguous positions in a step of its own, as it
must also see that turn's keys where they stood); freed slots are reused only after the forward that
could still see them; weights change only between two steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from rollout.attention import Segment, make_backend
from rollout.engine.contiguous import StepRotation
from rollout.engine.feed import KnownTurns, TurnFeed
from rollout.engine.kv_pool import KVPool
from rollout.engine.sampler import pick
from rollout.engine.slots import SlotList
from streams.backbone.backbone import Backbone, VideoTokens
from streams.backbone.kernel_choice import choose_rollout_attention
from streams.layout.lanes import Lanes
from streams.layout.layout import Layout
from streams.log.pieces import PieceSink
from streams.log.record import Kind, LogHeader, StreamLog
from streams.memory import MemoryPolicy, live_bound
from streams.writing.writer import StreamWriter, TurnInput


@dataclass(frozen=True)
class StreamRequest:
    """One stream to run. features: per chunk shown, [tokens, F] on the engine's device, in turn order; a feed brings its own.

    F = Backbone.feature_width; one row per kept video token of the chunk, in the order of the tokens. turns, features may
    make their items when asked. pieces: where the log goes, in pieces of `piece_tokens` tokens or little more; None = it is
    kept, and returned whole.
    """

    header: LogHeader
    turns: Sequence[TurnInput] | TurnFeed
    features: Sequence[torch.Tensor]
    policy: MemoryPolicy
    layout: Layout
    patch_seconds: float
    pieces: PieceSink | None = None
    piece_tokens: int = 4096


@dataclass(frozen=True)
class StreamFailure:
    """A stream that ended before its time, and why. The others ran on."""

    stream_id: str
    cause: str


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made."""

    steps: int = 0
    sampled_tokens: int = 0
    prefill_tokens: int = 0
    evicted_tokens: int = 0


@dataclass
class _Stream:
    request: StreamRequest
    writer: StreamWriter
    source: KnownTurns | TurnFeed
    reserved: int
    slots: SlotList = field(default_factory=SlotList)
    forwarded: int = 0
    failure: str = ""

    @property
    def between_turns(self) -> bool:
        return self.writer.state is None or self.writer.state.over

    @property
    def finished(self) -> bool:
        return self.between_turns and self.source.ended

    @property
    def idle(self) -> bool:
        """A live stream whose next turn has not come."""
        return self.between_turns and not self.source.ready and not self.source.ended

    def write_piece(self) -> None:
        """Hand out the log as far as it is long enough, or all of it at the end. A sink that cannot take it ends the stream."""
        sink, log = self.request.pieces, self.writer.log
        if sink is None or not (self.finished or self.forwarded - log.first >= self.request.piece_tokens):
            return
        piece = log.cut(log.length, last=True) if self.finished else log.cut(self.forwarded)
        try:
            sink.write(piece)
        except OSError as error:  # named boundary: one stream's log
            self.failure = f"piece {piece.number} of its log could not be written: {type(error).__name__}: {error}"

    @property
    def contiguous(self) -> bool:
        return self.writer.regions is not None


@dataclass
class _Step:
    """What one packed forward is made of, gathered stream by stream."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    new_slots: list[np.ndarray] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    video: list[np.ndarray] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    freed: list[np.ndarray] = field(default_factory=list)
    choosing: list[tuple[_Stream, int]] = field(default_factory=list)
    rotation: StepRotation = field(default_factory=StepRotation)
    rows: int = 0


def stream_bound(request: StreamRequest) -> int:
    """KV slots that a stream may hold at once."""
    sizes = _source(request).sizes(request.layout, request.policy.lanes)
    return live_bound(
        request.policy,
        per_turn=sizes.scaffold + sizes.video + request.layout.config.max_new_tokens,
        fixed=len(request.layout.system_ids) + sizes.queries + sizes.copies,
        video_per_turn=sizes.video,
        turns=sizes.turns,
    )


def _source(request: StreamRequest) -> KnownTurns | TurnFeed:
    return request.turns if isinstance(request.turns, TurnFeed) else KnownTurns(request.turns, request.features)


def _seen(stream: _Stream, begin: int, end: int) -> np.ndarray:
    """Slots that the segment [begin, end) of one lane attends to, its own included: live, of its lane or below."""
    held = stream.writer.held
    seen = slice(0, int(np.searchsorted(held.column("index"), end)))
    slots = stream.slots.held[seen]
    if stream.writer.policy.lanes is Lanes.ONE:
        return slots
    return slots[held.column("lane")[seen] <= stream.writer.log.column("lane", begin)[0]]


class Engine:
    """Runs StreamRequests to StreamLogs on one backbone."""

    def __init__(self, backbone: Backbone, kv_slots: int, max_streams: int, attention: str = "auto") -> None:
        kv_heads, head_dim = backbone.kv_shape
        self.backbone = backbone
        self.pool = KVPool(
            kv_slots, backbone.num_layers, kv_heads, head_dim, dtype=backbone.dtype, device=backbone.device
        )
        self.max_streams = max_streams
        self.version = 0
        self.stats = EngineStats()
        # "torch.bfloat16" is "bfloat16" in every configuration.
        dtype = str(backbone.dtype).removeprefix("torch.")
        self.attention = choose_rollout_attention(attention, backbone.device.type, dtype, head_dim)
        groups = int(backbone.model.config.text_config.num_attention_heads) // kv_heads
        self._backend = make_backend(self.attention.name, self.pool, groups)
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream] = []
        self._failed: list[StreamFailure] = []
        self._reserved = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything; False while every stream waits for its feed."""
        return self._can_admit() or any(not stream.idle for stream in self._running)

    def add(self, request: StreamRequest) -> StreamWriter:
        """Queue a stream; returns its writer, which grows as the stream runs (to be read between two steps only).

        Raises ValueError if it could never fit into the KV pool.
        """
        writer = StreamWriter(
            request.header, request.layout, request.policy, self.backbone.cursor(request.patch_seconds)
        )
        need = stream_bound(request)
        if need > self.pool.capacity:
            raise ValueError(
                f"stream {request.header.stream_id} may need {need} KV slots but the pool holds {self.pool.capacity}: "
                "raise rollout.kv_memory_mb, shorten the stream or choose a smaller memory.window (a feed has no end: its "
                "memory must bound video and text)"
            )
        if writer.regions is not None:
            self.hold_unrotated_keys()
        self._waiting.append(_Stream(request, writer, _source(request), need))
        return writer

    def hold_unrotated_keys(self) -> None:
        """Make room for what streams with contiguous positions need. Raises ValueError if the checkpoint cannot have them."""
        _ = self.backbone.rotary
        self.pool.keep_raw()

    @torch.no_grad()
    def step(self) -> list[StreamLog]:
        """Forward once; returns the streams that finished, but for those whose log went out in pieces."""
        self._admit()
        step = _Step()
        for stream in self._running:
            self._gather(stream, step)
        if step.rows:
            self._forward(step)
        running, logs = [], []
        for stream in self._running:
            if not stream.failure:
                stream.write_piece()
            if stream.failure:
                self._failed.append(StreamFailure(stream.request.header.stream_id, stream.failure))
            elif not stream.finished:
                running.append(stream)
                continue
            elif stream.request.pieces is None:
                logs.append(stream.writer.finish())
            self._release(stream)
        self._running = running
        return logs

    def take_failed(self) -> list[StreamFailure]:
        """The streams that have failed since this was asked last."""
        failed, self._failed = self._failed, []
        return failed

    def cancel(self, stream_ids: set[str]) -> None:
        """Forget these streams, waiting or running, and take their slots back. Call between two steps."""
        self._waiting = deque(s for s in self._waiting if s.request.header.stream_id not in stream_ids)
        for stream in [s for s in self._running if s.request.header.stream_id in stream_ids]:
            self._release(stream)
            self._running.remove(stream)

    def drop_all(self) -> None:
        """Forget every stream (after an error inside a step) and take all slots back."""
        self._waiting.clear()
        self._running.clear()
        self._reserved = 0
        self.pool.free(np.flatnonzero(self.pool._taken))

    def _release(self, stream: _Stream) -> None:
        self.pool.free(stream.slots.held)
        self._reserved -= stream.reserved

    def _can_admit(self) -> bool:
        room = self.pool.capacity - self._reserved
        return bool(self._waiting) and len(self._running) < self.max_streams and self._waiting[0].reserved <= room

    def _admit(self) -> None:
        while self._can_admit():
            stream = self._waiting.popleft()
            self._reserved += stream.reserved
            self._running.append(stream)

    def _gather(self, stream: _Stream, step: _Step) -> None:
        """Append what `stream` forwards next: the unforwarded end of its turn, then a prefill; or its next tokens."""
        writer = stream.writer
        if stream.between_turns:
            if not stream.source.ready:
                return
            stream.failure = stream.source.refuses(int((writer.held.column("kind") == Kind.QUERY).sum()))
            if stream.failure:
                return
            if stream.forwarded < writer.log.length:
                self._add_segment(stream, step)
                if stream.contiguous and stream.forwarded == writer.log.length:
                    return
            turn_input, features = stream.source.take()
            evicted, _ = writer.begin_turn(turn_input, self.version)
            held = len(writer.live) + len(evicted)
            if held > stream.reserved:  # slots that other streams were promised
                raise ValueError(
                    f"stream {stream.request.header.stream_id}: memory {stream.request.header.memory} holds {held} tokens in "
                    f"turn {writer.turn}, more than its max_live_tokens said ({stream.reserved}): correct that bound"
                )
            step.freed.append(stream.slots.drop(evicted))
            if writer.regions is not None:
                turned, positions = writer.regions.turned
                step.rotation.turn(stream.slots.of(turned), positions)
            if features is not None:
                video = np.flatnonzero(writer.log.column("kind", stream.forwarded) == Kind.VIDEO)
                step.video.append(step.rows + video)
                step.features.append(features)
        while (token := writer.forced()) is not None and not writer.state.over:  # type: ignore[union-attr]
            writer.append_generated(token, self.version)
        if stream.finished:
            return
        self._add_segment(stream, step)
        if not writer.state.over:  # type: ignore[union-attr]
            step.choosing.append((stream, step.rows - 1))

    def _add_segment(self, stream: _Stream, step: _Step) -> None:
        """All logged tokens not yet forwarded become one segment over the live slots, or one for every run of a lane."""
        log = stream.writer.log
        start, stop = stream.forwarded, log.length
        new = self.pool.allocate(stop - start)
        stream.slots.add(start, new)
        step.ids.append(log.column("ids", start).astype(np.int64))
        positions = log.positions_between(start, stop)
        step.positions.append(step.rotation.segment(positions, contiguous=stream.contiguous))
        step.new_slots.append(new)
        cuts = np.flatnonzero(np.diff(log.column("lane", start))) + start + 1
        for begin, end in pairwise([start, *cuts.tolist(), stop]):
            step.segments.append(Segment(step.rows, end - begin, _seen(stream, begin, end)))
            step.rows += end - begin
        stream.forwarded = stop

    def _forward(self, step: _Step) -> None:
        device = self.backbone.device
        ids = torch.from_numpy(np.concatenate(step.ids)).to(device)
        positions = torch.from_numpy(np.concatenate(step.positions, axis=1).astype(np.int64)).to(device)
        video = None
        if step.features:
            video = VideoTokens(torch.from_numpy(np.concatenate(step.video)).to(device), torch.cat(step.features))
        new_slots = np.concatenate(step.new_slots)
        attention = self._backend.plan(new_slots, step.segments)
        plan = step.rotation.plan(attention, self.pool, new_slots, self.backbone)
        hidden = self.backbone.hidden(ids[None], positions[:, None], plan, video)[0]
        for slots in step.freed:
            self.pool.free(slots)
        if step.choosing:
            self._choose(hidden, step.choosing)
        self.stats = EngineStats(
            steps=self.stats.steps + 1,
            sampled_tokens=self.stats.sampled_tokens + len(step.choosing),
            prefill_tokens=self.stats.prefill_tokens + step.rows - len(step.choosing),
            evicted_tokens=self.stats.evicted_tokens + sum(len(slots) for slots in step.freed),
        )

    def _choose(self, hidden: torch.Tensor, choosing: list[tuple[_Stream, int]]) -> None:
        """Sample the next token of every stream that has a choice, and log it with its log-prob and version."""
        rows = torch.tensor([row for _, row in choosing], device=hidden.device)
        headers = [stream.request.header for stream, _ in choosing]
        scale = torch.tensor([h.score_temperature for h in headers], dtype=torch.float64, device=hidden.device)
        logits = self.backbone.logits(hidden[rows], 1.0)
        logits = logits / scale.to(logits.dtype)[:, None]
        ids, logps = pick(
            logits,
            np.array([h.temperature == 0 for h in headers]),
            np.array([h.seed for h in headers], np.uint64),
            np.array([stream.writer.log.length for stream, _ in choosing], np.uint64),
        )
        for (stream, _), token, logp in zip(choosing, ids, logps, strict=True):
            stream.writer.append_generated(int(token), self.version, logp=float(logp), sampled=True, target=True)

"""The streaming engine: many streams at once, continuous batching, eviction by editing slot lists.

One visit of the host, read top to bottom in `Engine.step`:

    begin     turns: the end of one and the prefill of the next,
              packed into rows, and their first tokens                  step_plan.py, forward.py
    admit     waiting streams that fit, whose turns begin with them     admission.py
    decode    several tokens of every stream, without the host          rollout.decode
    collect   turns that are over, into the logs                        rollout.decode
    finish    logs of the streams that are over

Invariants:
* freed slots are reused only after the forward that could still see them;
* a stream is given back between two forwards, and never the oldest (`rollout.engine.admission`). It begins anew from its
  seed: the same tokens, if the weights are the same;
* weights, and `version` with them, change only between two visits;
* one thread calls everything here.
"""

from __future__ import annotations

import torch

from rollout.attention import make_backend, with_decode
from rollout.config import PREFILL_ROWS
from rollout.decode.decoder import Decoder
from rollout.engine.admission import Admission
from rollout.engine.forward import forward
from rollout.engine.kv_pool import KVPool
from rollout.engine.request import Stream, StreamFailure, StreamRequest, first_need, stream_bound
from rollout.engine.step_plan import StepPlan
from streams.backbone.backbone import Backbone
from streams.backbone.kernel_choice import (
    Choice,
    choose_cuda_graphs,
    choose_decode_attention,
    choose_rollout_attention,
)
from streams.log.record import StreamLog
from streams.writing.writer import StreamWriter


class Engine:
    """Runs StreamRequests to StreamLogs on one backbone.

    Attributes:
        version: of the weights that the backbone has; every token is logged with it.
        steps: forwards since the engine was made.
        prefilled: tokens that turns have begun with, forwarded; shared: those whose forward another stream's saved.
        attention, decode_attention: the attention backends of prefill and of decoding, and why those.
        graphs: how decode steps are launched, `graphs` or `eager`, and why.
    """

    def __init__(
        self,
        backbone: Backbone,
        kv_slots: int,
        max_streams: int,
        attention: str = "auto",
        decode_steps: int = 8,
        cuda_graphs: str = "auto",
    ) -> None:
        """decode_steps: tokens of a stream between two visits of the host, at most.

        Raises ValueError for a kernel that is asked for by name and cannot run here.
        """
        kv_heads, head_dim = backbone.kv_shape
        self.backbone = backbone
        # "torch.bfloat16" is "bfloat16" in every configuration.
        dtype = str(backbone.dtype).removeprefix("torch.")
        device = backbone.device.type
        self.attention = choose_rollout_attention(attention, device, dtype, head_dim)
        self.pool = KVPool(
            kv_slots,
            backbone.num_layers,
            kv_heads,
            head_dim,
            dtype=backbone.dtype,
            device=backbone.device,
            paged=self.attention.name == "flashinfer",
        )
        self.admission = Admission(self.pool.book, max_streams)
        self.version = 0
        self.steps = self.prefilled = self.shared = 0
        groups = int(backbone.model.config.text_config.num_attention_heads) // kv_heads
        self._backend, self.decode_attention = with_decode(
            choose_decode_attention(attention, device, self.attention.name),
            self.attention,
            make_backend(self.attention.name, self.pool, groups),
            self.pool,
            groups,
        )
        self._decoder = Decoder(backbone, self.pool, self._backend, max_streams, decode_steps)
        self._failed: list[StreamFailure] = []
        if device == "cpu":
            backbone.lay_out_for_few_rows()
        self.graphs = choose_cuda_graphs(cuda_graphs, device, self.decode_attention.name)
        if self.graphs.name == "graphs" and (failure := self._decoder.capture()):
            self.graphs = Choice("eager", failure)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything; False while every stream waits for its feed."""
        return self.admission.possible or any(not stream.idle for stream in self.admission.running)

    def add(self, request: StreamRequest) -> StreamWriter:
        """Queue a stream; returns its writer, which grows as the stream runs (to be read between two steps only).

        A stream that is given back goes on with another writer: the one returned is of use for a live stream, or alone.
        Raises ValueError if it could never fit into the KV pool.
        """
        need = stream_bound(request)
        if need > self.pool.capacity:
            raise ValueError(
                f"stream {request.header.stream_id} may need {need} KV slots but the pool holds {self.pool.capacity}: "
                "raise rollout.kv_memory_mb, shorten the stream or choose a smaller memory.window (a feed has no end: its "
                "memory must bound video and text)"
            )
        stream = _stream(request, self.backbone, need, first_need(request))
        if stream.contiguous:
            self.hold_unrotated_keys()
        self.admission.add(stream)
        return stream.writer

    def hold_unrotated_keys(self) -> None:
        """Make room for what streams with contiguous positions need. Raises ValueError if the checkpoint cannot have them."""
        _ = self.backbone.rotary
        self.pool.keep_raw()

    @torch.no_grad()
    def step(self) -> list[StreamLog]:
        """Make one visit; returns the streams that finished, but for those whose log went out in pieces.

        After an error in here turns may be half begun: call `drop_all` before anything else.
        """
        self._begin_turns()
        if self._decoder.running:
            self.steps += self._decoder.run(self.version)
            self.admission.resting.update(self._decoder.collect())
        return self._finish()

    def take_failed(self) -> list[StreamFailure]:
        """Return the live streams that have failed since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def cancel(self, stream_ids: set[str]) -> None:
        """Forget these streams, waiting or running, and free their slots. Call between two steps."""
        for stream in self.admission.cancel(stream_ids):
            self._release(stream)

    def drop_all(self) -> None:
        """Forget every stream (after an error inside a step) and free all slots."""
        self._decoder.clear()
        self.admission.clear()
        # Not stream by stream: slots that the failed step was about to free are in no stream's list any more.
        self.pool.book.clear()

    def _begin_turns(self) -> None:
        """Prefill the next turn of every stream that has one, in rows of about PREFILL_ROWS tokens."""
        plan = self._plan()
        for stream in self.admission.due():
            plan = self._begin(stream, plan)
        self._prefill(plan)

    def _begin(self, stream: Stream, plan: StepPlan) -> StepPlan:
        """Plan the next turn of a stream; returns the plan that later ones go into.

        Where there is no room, what is planned is forwarded, which frees what it evicts; then the youngest are given back.
        """
        turn = plan.open(stream)
        if turn is None:
            return plan
        full = plan.rows >= PREFILL_ROWS and not plan.leads(turn)
        if full or not plan.has_room(turn):
            self._prefill(plan)
            plan = self._plan()
            while not plan.has_room(turn):
                if self._give_back() is stream:
                    return plan
        plan.place(turn)
        self.admission.resting.remove(stream)
        return plan

    def _give_back(self) -> Stream:
        """Give the youngest stream back, to begin anew; returns it. Nothing of it may be in a plan."""
        stream = self.admission.youngest()
        need = max(stream.need, stream.slots.owned + first_need(stream.request))
        self._decoder.forget(stream)
        self.admission.give_back(stream, _stream(stream.request, self.backbone, stream.bound, need))
        stream.slots.close()
        return stream

    def _plan(self) -> StepPlan:
        return StepPlan(self.version)

    def _prefill(self, plan: StepPlan) -> None:
        if not plan.rows:
            return
        hidden = forward(plan, self.backbone, self._backend, self.pool)
        self.steps += 1
        self.prefilled += plan.turns.rows
        self.shared += plan.shared
        if plan.copies:
            self.pool.copy(plan.copies)
        for stream, slots in plan.freed:
            stream.slots.give_back(slots)
        if plan.choosing:
            self._decoder.first(plan.choosing, hidden[plan.ends.rows :], self.version)

    def _finish(self) -> list[StreamLog]:
        """Write what goes out in pieces and release the streams that are over; returns the logs that were kept."""
        logs = []
        for stream in self.admission.between_turns():
            if not stream.failure:
                stream.write_piece()
            if stream.failure:
                self._failed.append(StreamFailure(stream.id, stream.failure))
            elif not stream.finished:
                continue
            elif stream.request.pieces is None:
                logs.append(stream.writer.finish())
            self._release(stream)
        return logs

    def _release(self, stream: Stream) -> None:
        # One that is cancelled may be in the middle of a turn.
        self._decoder.forget(stream)
        stream.slots.close()
        self.admission.release(stream)


def _stream(request: StreamRequest, backbone: Backbone, bound: int, need: int) -> Stream:
    """Return the stream before its first turn."""
    writer = StreamWriter(request.header, request.layout, request.policy, backbone.cursor(request.patch_seconds))
    return Stream(request, writer, request.source(), bound, min(bound, need))

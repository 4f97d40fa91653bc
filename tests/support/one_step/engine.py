"""The streaming engine: many streams at once, continuous batching, eviction by editing slot lists.

One step, read top to bottom in `OneStepEngine.step`:

    admit     waiting streams whose bound fits                      admission.py
    gather    what every running stream forwards next, in one row   step_plan.py
    forward   the row through the model, over the pool's slots      forward.py
    free      slots that this row was the last to see               kv_pool.py
    choose    the next token of every stream that has a choice      choose.py
    finish    logs of the streams that are over

Invariants:
* freed slots are reused only after the forward that could still see them;
* weights, and `version` with them, change only between two steps;
* one thread calls everything here.
"""

from __future__ import annotations

import torch

from rollout.engine.request import StreamFailure, StreamRequest
from streams.backbone.backbone import Backbone
from streams.log.record import StreamLog
from tests.support.one_step.admission import Admission
from tests.support.one_step.choose import choose
from tests.support.one_step.forward import forward
from tests.support.one_step.kv_pool import KVPool
from tests.support.one_step.request import Stream, stream_bound
from tests.support.one_step.step_plan import StepPlan
from tests.support.one_step.torch_sdpa import TorchBackend
from tests.support.one_step.writer import StreamWriter


class OneStepEngine:
    """Runs StreamRequests to StreamLogs on one backbone.

    Attributes:
        version: of the weights that the backbone has; every token is logged with it.
        steps: forwards since the engine was made.
    """

    def __init__(self, backbone: Backbone, kv_slots: int, max_streams: int) -> None:
        kv_heads, head_dim = backbone.kv_shape
        self.backbone = backbone
        self.pool = KVPool(
            kv_slots, backbone.num_layers, kv_heads, head_dim, dtype=backbone.dtype, device=backbone.device
        )
        self.admission = Admission(self.pool.capacity, max_streams)
        self.version = 0
        self.steps = 0
        groups = int(backbone.model.config.text_config.num_attention_heads) // kv_heads
        self._backend = TorchBackend(self.pool, groups)
        self._failed: list[StreamFailure] = []

    @property
    def busy(self) -> bool:
        """Return whether a step would do anything; False while every stream waits for its feed."""
        return self.admission.possible or any(not stream.idle for stream in self.admission.running)

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
        self.admission.add(Stream(request, writer, request.source(), need))
        return writer

    def hold_unrotated_keys(self) -> None:
        """Make room for what streams with contiguous positions need. Raises ValueError if the checkpoint cannot have them."""
        _ = self.backbone.rotary
        self.pool.keep_raw()

    @torch.no_grad()
    def step(self) -> list[StreamLog]:
        """Forward once; return the streams that finished, except those whose log was handed out in pieces."""
        self.admission.admit()
        step = self._gather()
        if step.rows:
            hidden = forward(step, self.backbone, self._backend, self.pool)
            for slots in step.freed:
                self.pool.free(slots)
            if step.choosing:
                choose(step.choosing, hidden, self.backbone, self.version)
            self.steps += 1
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
        self.admission.clear()
        # Empty the pool, not stream by stream: slots that the failed step was about to free are in no stream's list any more.
        self.pool.free_all()

    def _gather(self) -> StepPlan:
        step = StepPlan(self.pool, self.version)
        for stream in self.admission.running:
            step.gather(stream)
        return step

    def _finish(self) -> list[StreamLog]:
        """Write what goes out in pieces and release the streams that are over; returns the logs that were kept."""
        logs = []
        for stream in list(self.admission.running):
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
        self.pool.free(stream.slots.held)
        self.admission.release(stream)

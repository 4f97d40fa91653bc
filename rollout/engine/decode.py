"""Decoding on the device: one token for every running stream per step, several steps per visit of the host.

    first     the first token of turns that were just prefilled, from their hidden states
    step      forward the last token of every lane, draw or force the next, advance
    collect   what was drawn since the last visit, read once; turns that are over are written into the logs

Invariants:
* a step reads and writes buffers of `DecodeState` and the pool only; nothing in `decode_step` waits for the device
  (`TorchBackend` and FlashInfer's planning read lengths: they are not meant to be captured);
* a token depends on its stream's seed, its index in the log and its logits, and on nothing else in the batch;
* forced tokens are the layout's (`streams.layout.turn_state`): the end of a thought at its budget, here; the end of a turn at
  its budget, by the host, as nobody attends to it in this turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.attention import AttentionBackend
from rollout.engine import sampler
from rollout.engine.decode_state import DecodeState, Field
from rollout.engine.forward import decode_forward
from rollout.engine.kv_pool import KVPool
from rollout.engine.request import Stream
from streams.backbone.backbone import Backbone

WORTH_A_STEP = 0.5
"""On a CPU a visit comes early once less than this share of the lanes that it began with still run."""


@dataclass
class _Drawn:
    """What a stream has drawn and its log does not have yet. length: slots that hold its forwarded tokens."""

    version: int
    length: int
    ids: list[np.ndarray] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)


class Decoder:
    """The lanes of one engine. steps: decode steps per visit."""

    def __init__(self, backbone: Backbone, pool: KVPool, backend: AttentionBackend, lanes: int, steps: int) -> None:
        self._backbone, self._pool, self._backend, self._steps = backbone, pool, backend, steps
        self.state = DecodeState(lanes, steps + 1, pool.trash, backbone.device)
        self._streams: list[Stream | None] = [None] * lanes
        self._running: dict[Stream, int] = {}
        self._drawn: dict[Stream, _Drawn] = {}

    @property
    def running(self) -> bool:
        """Whether a turn is being generated."""
        return bool(self._running)

    def first(self, choosing: list[tuple[Stream, int]], hidden: torch.Tensor, version: int) -> None:
        """Give turns that were prefilled a lane and their first token. choosing: streams, and their rows of hidden [N, H]."""
        free = (i for i, stream in enumerate(self._streams) if stream is None)
        lanes = np.array([lane for lane, _ in zip(free, choosing, strict=False)])
        ints = np.empty((len(Field), len(choosing)), np.int64)
        slots = []
        for i, (stream, _) in enumerate(choosing):
            ints[:, i], row = _entry(stream)
            slots.append(row)
            self._streams[lanes[i]] = stream
            self._running[stream] = int(lanes[i])
            self._drawn[stream] = _Drawn(version, len(stream.slots.held))
        scale = np.array([stream.request.header.score_temperature for stream, _ in choosing], np.float64)
        self.state.widen(max(len(row) for row in slots))
        self.state.write(lanes, ints, scale, slots)
        device = hidden.device
        rows = torch.tensor([row for _, row in choosing], device=device)
        at = torch.from_numpy(lanes).to(device)
        now = self.state.ints[:, at]
        self._choose(now, at, hidden[rows])

    def run(self) -> int:
        """Decode for one visit; returns the number of steps."""
        lanes = torch.tensor(sorted(self._running.values()), device=self.state.ints.device)
        enough = WORTH_A_STEP * len(lanes)
        for step in range(self._steps):
            if lanes.device.type == "cpu":
                # Rows cost as much as they are many, and looking costs nothing.
                lanes = lanes[self.state.ints[Field.RUNNING, lanes] != 0]
                if not len(lanes) or len(lanes) < enough:
                    return step
            self.step(lanes)
        return self._steps

    def step(self, lanes: torch.Tensor) -> None:
        """Forward the last token of lanes int64 [n] and choose their next one."""
        state = self.state
        now = state.ints[:, lanes]
        running = now[Field.RUNNING] != 0
        length = now[Field.LENGTH]
        slots = state.table[lanes, length].masked_fill(~running, state.trash)
        attend = self._backend.decode(state.table, lanes, length + 1)
        contiguous = now[Field.CONTIGUOUS] != 0 if self._any_contiguous() else None
        hidden = decode_forward(
            now[Field.TOKEN], now[Field.POSITION], contiguous, slots, attend, self._backbone, self._pool
        )
        now[Field.LENGTH] += running
        now[Field.POSITION] += running
        self._choose(now, lanes, hidden)

    def collect(self, version: int) -> None:
        """Take over what was drawn since the last visit; turns that are over go into the logs.

        version: of the weights that drew it.
        """
        if not self._running:
            return
        fields = self.state.ints[[Field.EMITTED, Field.LENGTH, Field.RUNNING]].cpu().tolist()
        # By lane, and as copies: on a CPU these are the buffers themselves.
        ids, logps = (np.array(drawn.cpu().numpy().T, order="C") for drawn in (self.state.ids, self.state.logps))
        for stream, lane in list(self._running.items()):
            emitted, length, running = (field[lane] for field in fields)
            drawn = self._drawn[stream]
            if drawn.version != version:
                self._write(stream, drawn)
                drawn = self._drawn[stream] = _Drawn(version, drawn.length)
            drawn.ids.append(ids[lane, :emitted])
            drawn.logps.append(logps[lane, :emitted])
            drawn.length = length
            if not running:
                self._write(stream, drawn)
                # The last token that a turn may have is its end, whatever the model would say.
                if (token := stream.writer.forced() if not stream.between_turns else None) is not None:
                    stream.writer.extend_generated([token], version)
                self._leave(stream)
        self.state.ints[Field.EMITTED] = 0

    def _write(self, stream: Stream, drawn: _Drawn) -> None:
        """Log what a stream has drawn under one version of the weights: once a turn, as each write has its price."""
        if not drawn.ids:
            return
        logps = np.concatenate(drawn.logps)
        stream.writer.extend_generated(np.concatenate(drawn.ids), drawn.version, logps=logps, target=~np.isnan(logps))
        forwarded = drawn.length - len(stream.slots.held)
        stream.slots.add(stream.forwarded, forwarded)
        stream.forwarded += forwarded

    def forget(self, stream: Stream) -> None:
        """Stop a stream that was cancelled, wherever it is in its turn."""
        if stream in self._running:
            self.state.stop([self._running[stream]])
            self._leave(stream)

    def clear(self) -> None:
        """Stop every stream."""
        for stream in list(self._running):
            self.forget(stream)

    def _leave(self, stream: Stream) -> None:
        self._streams[self._running.pop(stream)] = None
        del self._drawn[stream]

    def _any_contiguous(self) -> bool:
        return any(stream.contiguous for stream in self._running)

    def _greedy(self, now: torch.Tensor) -> torch.Tensor | bool:
        kinds = {stream.request.header.temperature == 0 for stream in self._running}
        return now[Field.GREEDY] != 0 if len(kinds) > 1 else kinds == {True}

    def _choose(self, now: torch.Tensor, lanes: torch.Tensor, hidden: torch.Tensor) -> None:
        """Draw the next token of lanes int64 [n] from hidden [n, H], and write it and their advanced state."""
        state = self.state
        # One matrix product for all, then each row by its own temperature: the learner scores with the same division.
        logits = self._backbone.logits(hidden, 1.0)
        logits = logits / state.scale[lanes].to(logits.dtype)[:, None]
        drawn, logps = sampler.draw(logits, self._greedy(now), now[Field.SEED], now[Field.INDEX])
        tokens = self._backbone.layout.tokens
        running, thinking = now[Field.RUNNING] != 0, now[Field.THINKING] != 0
        # The last token of a thought is its end, as TurnState.forced has it.
        ends_thought = thinking & (now[Field.COUNT] == now[Field.THINK_BUDGET] - 1)
        chosen = drawn.masked_fill(ends_thought, tokens.think_end)
        emitted = now[Field.EMITTED]
        state.ids[emitted, lanes] = chosen
        state.logps[emitted, lanes] = logps.masked_fill(ends_thought, torch.nan)
        count = now[Field.COUNT] + 1
        # Behind the last but one token of a turn its end is forced, and needs neither forward nor draw.
        goes_on = running & (chosen != tokens.im_end) & (count < now[Field.MAX_NEW] - 1)
        new = now.clone()
        new[Field.TOKEN] = chosen
        new[Field.INDEX] += 1
        new[Field.COUNT] = count
        new[Field.EMITTED] += 1
        new[Field.THINKING] = thinking & (chosen != tokens.think_end)
        new[Field.RUNNING] = goes_on
        state.ints[:, lanes] = torch.where(running, new, now)


def _entry(stream: Stream) -> tuple[list[int], np.ndarray]:
    """Return the fields of a lane whose turn was just prefilled, in the order of Field, and the lane's slots."""
    writer, header, config = stream.writer, stream.request.header, stream.request.layout.config
    assert writer.state is not None
    ahead = config.max_new_tokens - writer.state.count
    fields = {
        Field.TOKEN: 0,
        Field.INDEX: writer.log.length,
        Field.POSITION: writer.next_position,
        Field.LENGTH: len(stream.slots.held),
        Field.COUNT: writer.state.count,
        Field.THINKING: int(writer.state.thinking),
        Field.RUNNING: 1,
        Field.EMITTED: 0,
        Field.THINK_BUDGET: config.think_budget,
        Field.MAX_NEW: config.max_new_tokens,
        Field.SEED: header.seed,
        Field.GREEDY: int(header.temperature == 0),
        Field.CONTIGUOUS: int(stream.contiguous),
    }
    return [fields[field] for field in Field], stream.slots.row(ahead)

"""Decoding on the device: one token for every running stream per step, several steps per visit of the host.

    first     the first token of turns that were just prefilled, from their hidden states
    step      forward the last token of every seat, draw or force the next, advance
    collect   what was drawn since the last visit, read once; turns that are over are written into the logs

Invariants:
* a step reads and writes buffers of `DecodeState` and the pool only, and waits for nothing but what its attention backend
  reads back. With one that reads nothing (`captures`) it is captured as CUDA graphs (`rollout.decode.graphs`);
* a token depends on its stream's seed, its index in the log and its logits, and on nothing else in the batch;
* forced tokens are the layout's (`streams.layout.turn_state`): the end of a thought at its budget, here; the end of a turn at
  its budget, by the host, as nobody attends to it in this turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import torch

from rollout.attention import AttentionBackend
from rollout.decode import sampler
from rollout.decode.graphs import StepGraphs
from rollout.decode.state import CHANGES, DecodeState, Field, Kinds, Seat
from rollout.engine.forward import decode_forward
from rollout.engine.kv_pool import KVPool
from rollout.engine.request import Stream
from streams.backbone.backbone import Backbone

WORTH_A_STEP = 0.5
"""On a CPU a visit comes early once less than this share of the seats that it began with still run."""
_FORCED = np.array([np.nan])
"""The log-prob of a token that was not drawn."""


@dataclass
class _Turn:
    """A turn that is being generated, and what it has drawn that its log does not have yet.

    Attributes:
        seat: its place in the buffers.
        version: of the weights that drew `ids` and `logps`.
        length: slots that hold forwarded tokens of its stream.
    """

    seat: int
    version: int
    length: int
    ids: list[np.ndarray] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)


class Decoder:
    """The turns that one engine generates. steps: decode steps per visit."""

    def __init__(self, backbone: Backbone, pool: KVPool, backend: AttentionBackend, seats: int, steps: int) -> None:
        self._backbone, self._pool, self._backend, self._steps = backbone, pool, backend, steps
        self.state = DecodeState(seats, steps + 1, pool.trash, backbone.device)
        self._turns: dict[Stream, _Turn] = {}
        self._free = list(range(seats))  # a heap: the lowest is taken first
        self._greedy = self._contiguous = 0  # how many of the turns
        self._graphs: StepGraphs | None = None

    @property
    def running(self) -> bool:
        """Whether a turn is being generated."""
        return bool(self._turns)

    @torch.no_grad()
    def capture(self) -> str:
        """Replay steps as CUDA graphs from now on; returns why not, if a step cannot be captured."""
        self._graphs = StepGraphs(self.step, self.state, self._pool, self._backbone)
        return self._graphs.prepare()

    def first(self, choosing: list[tuple[Stream, int]], hidden: torch.Tensor, version: int) -> None:
        """Give turns that were prefilled a seat and their first token. choosing: streams, and their rows of hidden [N, H]."""
        seats, slots = [], []
        for stream, _ in choosing:
            # First what may fail: a seat that is taken is one of a turn, or nobody would give it back.
            slots.append(stream.slots.row(stream.ahead))
            seats.append(heappop(self._free))
            self._turns[stream] = _Turn(seats[-1], version, len(stream.slots))
            self._greedy += stream.greedy
            self._contiguous += stream.contiguous
        self.state.widen(max(len(row) for row in slots))
        taken = np.array(seats)
        scale = [stream.request.header.score_temperature for stream, _ in choosing]
        self.state.write(taken, [_seat(stream) for stream, _ in choosing], scale, slots)
        device = hidden.device
        rows = torch.tensor([row for _, row in choosing], device=device)
        at = torch.from_numpy(taken).to(device)
        self._choose(self.state.ints.index_select(1, at), at, hidden[rows], self._kinds())

    def run(self, version: int) -> int:
        """Decode for one visit; returns the number of steps. version: of the weights."""
        running = sorted(turn.seat for turn in self._turns.values())
        kinds = self._kinds()
        if self._graphs is not None and self._graphs.replay(running, kinds, self._steps, version):
            return self._steps
        seats = torch.tensor(running, device=self.state.ints.device)
        enough = WORTH_A_STEP * len(seats)
        for step in range(self._steps):
            if seats.device.type == "cpu":
                # Rows cost as much as they are many, and looking costs nothing.
                alive = self.state.ints[Field.RUNNING].index_select(0, seats) != 0
                if not alive.all():
                    seats = seats[alive]
                # One step at least: or turns would wait as long as others are over with their first token.
                if not len(seats) or (step and len(seats) < enough):
                    return step
            self.step(seats, kinds)
        return self._steps

    def step(self, seats: torch.Tensor, kinds: Kinds) -> None:
        """Forward the last token of seats int64 [n] and choose their next one."""
        state = self.state
        now = state.ints.index_select(1, seats)
        running = now[Field.RUNNING] != 0
        length = now[Field.LENGTH]
        slots = state.table[seats, length].masked_fill(~running, state.trash)
        attend = self._backend.decode(state.table, seats, length + 1)
        contiguous = now[Field.CONTIGUOUS] != 0 if kinds.contiguous else None
        hidden = decode_forward(
            now[Field.TOKEN], now[Field.POSITION], contiguous, slots, attend, self._backbone, self._pool
        )
        now[Field.LENGTH] += running
        now[Field.POSITION] += running
        self._choose(now, seats, hidden, kinds)

    def collect(self, version: int) -> None:
        """Take over what was drawn since the last visit; turns that are over go into the logs.

        version: of the weights that drew it.
        """
        if not self._turns:
            return
        fields = self.state.ints[[Field.EMITTED, Field.LENGTH, Field.RUNNING]].cpu().tolist()
        # By seat, and as copies: on a CPU these are the buffers themselves.
        ids, logps = (np.array(drawn.cpu().numpy().T, order="C") for drawn in (self.state.ids, self.state.logps))
        for stream, turn in list(self._turns.items()):
            emitted, length, running = (field[turn.seat] for field in fields)
            if turn.version != version:
                self._write(stream, turn)
                turn = self._turns[stream] = _Turn(turn.seat, version, turn.length)
            turn.ids.append(ids[turn.seat, :emitted])
            turn.logps.append(logps[turn.seat, :emitted])
            turn.length = length
            if not running:
                if turn.ids[-1][-1] != (end := self._backbone.layout.tokens.im_end):
                    # The last token that a turn may have is its end, whatever the model would say.
                    turn.ids.append(np.array([end]))
                    turn.logps.append(_FORCED)
                self._write(stream, turn)
                assert stream.between_turns, "a turn has stopped without its end"
                self._leave(stream)
        self.state.ints[Field.EMITTED] = 0

    def _write(self, stream: Stream, turn: _Turn) -> None:
        """Log what a turn has drawn under one version of the weights: mostly all of it, as each write has its price."""
        if not turn.ids:
            return
        logps = np.concatenate(turn.logps)
        stream.writer.extend_generated(np.concatenate(turn.ids), turn.version, logps=logps, target=~np.isnan(logps))
        forwarded = turn.length - len(stream.slots)
        stream.slots.add(forwarded)
        stream.forwarded += forwarded

    def forget(self, stream: Stream) -> None:
        """Stop a stream that was cancelled, wherever it is in its turn."""
        if stream in self._turns:
            self.state.stop([self._leave(stream)])

    def clear(self) -> None:
        """Stop every stream."""
        for stream in list(self._turns):
            self.forget(stream)

    def _leave(self, stream: Stream) -> int:
        """Take a stream's turn out; returns its seat, which is free."""
        seat = self._turns.pop(stream).seat
        heappush(self._free, seat)
        self._greedy -= stream.greedy
        self._contiguous -= stream.contiguous
        return seat

    def _kinds(self) -> Kinds:
        some = 0 < self._greedy < len(self._turns)
        return Kinds(self._contiguous > 0, None if some else self._greedy > 0)

    def _choose(self, now: torch.Tensor, seats: torch.Tensor, hidden: torch.Tensor, kinds: Kinds) -> None:
        """Draw the next token of seats int64 [n] from hidden [n, H], and write it and their advanced state."""
        state = self.state
        logits = self._backbone.logits(hidden, state.scale[seats])
        greedy = now[Field.GREEDY] != 0 if kinds.greedy is None else kinds.greedy
        drawn, logps = sampler.draw(logits, greedy, now[Field.SEED], now[Field.INDEX])
        tokens = self._backbone.layout.tokens
        running, thinking = now[Field.RUNNING] != 0, now[Field.THINKING] != 0
        # The last token of a thought is its end, as TurnState.forced has it.
        ends_thought = thinking & (now[Field.COUNT] == now[Field.THINK_BUDGET] - 1)
        chosen = drawn.masked_fill(ends_thought, tokens.think_end)
        emitted = now[Field.EMITTED]
        state.ids[emitted, seats] = chosen
        state.logps[emitted, seats] = logps.masked_fill(ends_thought, torch.nan)
        count = now[Field.COUNT] + 1
        # Behind the last but one token of a turn its end is forced, and needs neither forward nor draw.
        goes_on = running & (chosen != tokens.im_end) & (count < now[Field.MAX_NEW] - 1)
        before = now[:CHANGES]
        new = before.clone()
        new[Field.TOKEN] = chosen
        new[Field.INDEX] += 1
        new[Field.COUNT] = count
        new[Field.EMITTED] += 1
        new[Field.THINKING] = thinking & (chosen != tokens.think_end)
        new[Field.RUNNING] = goes_on
        state.ints[:CHANGES].index_copy_(1, seats, torch.where(running, new, before))


def _seat(stream: Stream) -> Seat:
    """Return what the buffers are told of a turn that was just prefilled."""
    writer, config = stream.writer, stream.request.layout.config
    assert writer.state is not None
    return Seat(
        TOKEN=0,
        INDEX=writer.log.length,
        POSITION=writer.next_position,
        LENGTH=len(stream.slots),
        COUNT=writer.state.count,
        THINKING=writer.state.thinking,
        RUNNING=True,
        EMITTED=0,
        THINK_BUDGET=config.think_budget,
        MAX_NEW=config.max_new_tokens,
        SEED=stream.request.header.seed,
        GREEDY=stream.greedy,
        CONTIGUOUS=stream.contiguous,
    )

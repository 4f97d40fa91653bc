"""Decoding on the device: one token for every running stream per step, several steps per visit of the host.

    first     the first token of turns that were just prefilled, from their hidden states
    step      forward the last token of every seat, draw or force the next, advance
    collect   turns that are over, read and written into the logs; what the others have drawn stays where it is

Invariants:
* a step reads and writes buffers of `DecodeState` and the pool only, and waits for nothing but what its attention backend
  reads back. With one that reads nothing (`captures`) it is captured as CUDA graphs (`rollout.decode.graphs`);
* a token depends on its stream's seed, its index in the log and its logits, and on nothing else in the batch;
* forced tokens are the layout's (`streams.layout.turn_state`): the end of a thought at its budget, here; the end of a turn at
  its budget, by the host, as nobody attends to it in this turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import torch

from rollout.attention import AttentionBackend
from rollout.decode import sampler
from rollout.decode.graphs import StepGraphs
from rollout.decode.state import CHANGES, ROW, Array, DecodeState, Fields, Kinds
from rollout.engine.forward import decode_forward
from rollout.engine.kv_pool import KVPool
from rollout.engine.request import Stream
from streams.backbone.backbone import Backbone

WORTH_A_STEP = 0.5
"""On a CPU a visit comes early once less than this share of the seats that it began with still run."""


@dataclass(slots=True)
class _Turn:
    """A turn that is being generated.

    Attributes:
        seat: its place in the buffers.
        version: of the weights that drew what the buffers have of it.
    """

    seat: int
    version: int


class Decoder:
    """The turns that one engine generates. steps: decode steps per visit."""

    def __init__(self, backbone: Backbone, pool: KVPool, backend: AttentionBackend, seats: int, steps: int) -> None:
        self._backbone, self._pool, self._backend, self._steps = backbone, pool, backend, steps
        self.state = DecodeState(seats, pool.trash, backbone.device)
        self._turns: dict[Stream, _Turn] = {}
        self._version = -1  # of the weights of the last visit
        self._free = list(range(seats))  # a heap: the lowest is taken first
        self._greedy = self._contiguous = 0  # how many of the turns
        self._graphs: StepGraphs | None = None
        # What a token adds to the fields that a step writes, where its predecessor's keys have come into the pool, or not.
        self._moves = [torch.tensor(_moves(forwarded), device=backbone.device) for forwarded in (False, True)]

    @property
    def running(self) -> bool:
        """Whether a turn is being generated."""
        return bool(self._turns)

    @torch.no_grad()
    def capture(self) -> str:
        """Replay steps as CUDA graphs from now on; returns why not, if a step cannot be captured."""
        self.state.use_tensors()
        self._graphs = StepGraphs(self.step, self.state, self._pool, self._backbone)
        return self._graphs.prepare()

    def first(self, choosing: list[tuple[Stream, int]], hidden: torch.Tensor, version: int) -> None:
        """Give turns that were prefilled a seat and their first token. choosing: streams, and their rows of hidden [N, H]."""
        seats, slots = [], []
        for stream, _ in choosing:
            # First what may fail: a seat that is taken is one of a turn, or nobody would give it back.
            slots.append(stream.slots.row(stream.ahead))
            seats.append(heappop(self._free))
            self._turns[stream] = _Turn(seats[-1], version)
            self._greedy += stream.greedy
            self._contiguous += stream.contiguous
        self.state.make_room(max(map(len, slots)), max(stream.ahead for stream, _ in choosing))
        taken = np.array(seats)
        scale = [stream.request.header.score_temperature for stream, _ in choosing]
        self.state.write(taken, [_seat(stream) for stream, _ in choosing], scale, slots)
        rows = torch.tensor([row for _, row in choosing], device=hidden.device)
        at = self.state.array(torch.from_numpy(taken).to(hidden.device))
        ints = self.state.arrays.ints[:, at]
        # None has begun before, so none has ended.
        kinds = self._kinds()._replace(ended=False)
        self._choose(Fields(*ints), ints, at, hidden[rows], kinds, forwarded=False)

    def run(self, version: int) -> int:
        """Decode for one visit; returns the number of steps. version: of the weights."""
        if version != self._version:
            older = [stream for stream, turn in self._turns.items() if turn.version != version]
            self._write(older)
            for stream in older:
                self._turns[stream].version = version
            self._version = version
        running = sorted(turn.seat for turn in self._turns.values())
        kinds = self._kinds()
        if self._graphs is not None and self._graphs.replay(running, kinds, self._steps, version):
            return self._steps
        seats = torch.tensor(running, device=self.state.ints.device)
        if not self.state.on_host:
            for _ in range(self._steps):
                self.step(seats, kinds)
            return self._steps
        # Rows cost as much as they are many, and looking costs nothing.
        kinds = kinds._replace(ended=False)
        enough = WORTH_A_STEP * len(seats)
        for step in range(self._steps):
            alive = self.state.ints[ROW.running].numpy()[seats.numpy()] != 0
            if not alive.all():
                seats = seats[torch.from_numpy(alive)]
                # One step at least: or turns would wait as long as others are over with their first token.
                if not len(seats) or (step and len(seats) < enough):
                    return step
            self.step(seats, kinds)
        return self._steps

    def step(self, seats: torch.Tensor, kinds: Kinds) -> None:
        """Forward the last token of seats int64 [n] and choose their next one."""
        state = self.state
        tensor, where = state.tensor, state.library.where
        at = state.array(seats)
        ints = state.arrays.ints[:, at]
        now = Fields(*ints)
        slots = state.arrays.table[at, now.length]
        if kinds.ended:
            slots = where(now.running != 0, slots, state.trash)
        attend = self._backend.decode(state.table, seats, tensor(now.length + 1))
        contiguous = tensor(now.contiguous != 0) if kinds.contiguous else None
        hidden = decode_forward(
            tensor(now.token), tensor(now.position), contiguous, tensor(slots), attend, self._backbone, self._pool
        )
        self._choose(now, ints, at, hidden, kinds, forwarded=True)

    def collect(self) -> list[Stream]:
        """Write the turns that are over into their logs; returns their streams."""
        running = self.state.ints[ROW.running].tolist()
        over = [stream for stream, turn in self._turns.items() if not running[turn.seat]]
        self._write(over, end=self._backbone.layout.tokens.im_end)
        for stream in over:
            assert stream.between_turns, "a turn has stopped without its end"
            self._leave(stream)
        return over

    def _write(self, streams: Sequence[Stream], end: int | None = None) -> None:
        """Log what these turns have drawn since they began, or since weights last changed: under one version each.

        end: the id that their last token must be; None: they go on.
        """
        if not streams:
            return
        turns = [self._turns[stream] for stream in streams]
        seats = torch.tensor([turn.seat for turn in turns], device=self.state.ints.device)
        emitted, length = self.state.ints[[ROW.emitted, ROW.length]].index_select(1, seats).cpu().numpy()
        # A column more than was drawn: room for an end.
        most = int(emitted.max()) + 1
        ids, logps = (
            drawn[:most].index_select(1, seats).cpu().numpy().T for drawn in (self.state.ids, self.state.logps)
        )
        ids, logps = ids.astype(np.int32, order="C"), logps.copy(order="C")
        if end is not None:
            # The last token that a turn may have is its end, whatever the model would say.
            cut = (ids[np.arange(len(ids)), emitted - 1] != end).nonzero()[0]
            ids[cut, emitted[cut]], logps[cut, emitted[cut]] = end, np.nan
            emitted[cut] += 1
        columns = (ids, logps, ~np.isnan(logps))
        for i, (stream, turn, count, held) in enumerate(
            zip(streams, turns, emitted.tolist(), length.tolist(), strict=True)
        ):
            drawn = [column[i, :count] for column in columns]
            if 2 * count < most:  # a log keeps what it is given, and a view keeps the turns that were read with it
                drawn = [column.copy() for column in drawn]
            stream.writer.extend_generated(drawn[0], turn.version, logps=drawn[1], target=drawn[2])
            forwarded = held - len(stream.slots)
            stream.slots.add(forwarded)
            stream.forwarded += forwarded
        self.state.ints[ROW.emitted].index_fill_(0, seats, 0)

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

    def _choose(
        self, now: Fields[Array], ints: Array, seats: Array, hidden: torch.Tensor, kinds: Kinds, *, forwarded: bool
    ) -> None:
        """Draw the next token of seats int64 [n] from hidden [n, H], and write it and their advanced state.

        ints: int64 [fields, n], what they have; now: its rows. forwarded: whether the keys of their last token have come into
        the pool.
        """
        arrays, array, tensor = self.state.arrays, self.state.array, self.state.tensor
        where = self.state.library.where
        logits = self._backbone.logits(hidden, tensor(arrays.scale[seats]))
        greedy = tensor(now.greedy != 0) if kinds.greedy is None else kinds.greedy
        drawn, logps = sampler.draw(logits, greedy, tensor(now.seed), tensor(now.log_index))
        tokens = self._backbone.layout.tokens
        new = ints[:CHANGES] + array(self._moves[forwarded])
        thinking, written = now.thinking != 0, new[ROW.written]
        # The last token of a thought is its end, as TurnState.forced has it.
        ends_thought = thinking & (written == now.think_budget)
        chosen = where(ends_thought, tokens.think_end, array(drawn))
        arrays.ids[now.emitted, seats] = chosen
        arrays.logps[now.emitted, seats] = where(ends_thought, torch.nan, array(logps))
        new[ROW.token] = chosen
        new[ROW.thinking] = thinking & (chosen != tokens.think_end)
        # Behind the last but one token of a turn its end is forced, and needs neither forward nor draw.
        new[ROW.running] = (chosen != tokens.im_end) & (written < now.max_new - 1)
        if kinds.ended:
            new = where(now.running != 0, new, ints[:CHANGES])
        arrays.ints[:CHANGES, seats] = new


def _moves(forwarded: bool) -> list[list[int]]:
    """Return what is added to each of the fields that a step writes, [CHANGES, 1]; it sets those anew that 0 is added to."""
    by = Fields(0, 1, int(forwarded), int(forwarded), 1, 0, 0, 1, *[0] * (len(ROW) - CHANGES))
    return [[value] for value in by[:CHANGES]]


def _seat(stream: Stream) -> tuple[int, ...]:
    """Return what the buffers are told of a turn that was just prefilled: the rows of `ints`, in the order of Fields."""
    writer = stream.writer
    state = writer.state
    assert state is not None
    token, running, emitted = 0, True, 0
    changing = (token, writer.log.length, writer.next_position, len(stream.slots), state.count, state.thinking)
    return (*changing, running, emitted, *stream.constants)

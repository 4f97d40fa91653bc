"""The state of the streams that generate, in buffers on the device, where each has a seat.

A decode step (`rollout.decode.decoder`) is a function of these buffers and of nothing else. The host writes a seat when its
turn has been prefilled, and reads what it has drawn when the turn is over.

On a CPU the same memory is read and written through numpy, whose operations on so few numbers take a third of the time of
torch's. A step is written in what both have: operators, indexing and `where`.

Invariants:
* no buffer is replaced while a visit decodes; larger ones are made before, as turns begin;
* a seat that does not run is left as it is by a decode step, whatever the batch computes for it;
* `nobody`, the last seat, never runs: it fills batches up, and a step that is only tried out runs on it;
* row i of `ids` and `logps` is the seat's i-th token since it was last read, for i < `emitted`.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Array = Any
"""A tensor, or on a CPU a numpy array: what `DecodeState.library` calls an array."""


class Fields(NamedTuple, Generic[T]):
    """The rows of `DecodeState.ints`, one value a seat each. A decode step writes the first ones, up to `emitted`.

    Attributes:
        token: the last id, logged or drawn, that is not forwarded yet.
        log_index: of the next token.
        position: the position id of `token`.
        length: slots of the seat that hold forwarded tokens.
        written: tokens of the turn so far.
        thinking: inside the thought.
        running: the turn goes on.
        emitted: tokens since it was last read.
        think_budget, max_new: of the stream's layout.
        seed, greedy, contiguous: of the stream.
    """

    token: T
    log_index: T
    position: T
    length: T
    written: T
    thinking: T
    running: T
    emitted: T
    think_budget: T
    max_new: T
    seed: T
    greedy: T
    contiguous: T


ROW = Fields(*range(len(Fields._fields)))
"""Where each is."""
CHANGES = ROW.emitted + 1
"""How many of them a decode step writes."""

ROOM = 64
"""What the width of the table and the rows of what is drawn are a multiple of, and at least."""


class Kinds(NamedTuple):
    """What the host knows of all rows of a batch; a decode step leaves out what none of them needs.

    Attributes:
        contiguous: whether the engine rotates any of them.
        greedy: whether all (True) or none (False) take the largest logit; None: some do.
        ended: whether some may have ended.
    """

    contiguous: bool = False
    greedy: bool | None = False
    ended: bool = True


class Buffers(NamedTuple, Generic[T]):
    """The buffers of all seats; their shapes are those of `DecodeState`."""

    ints: T
    scale: T
    table: T
    ids: T
    logps: T


class DecodeState:
    """The buffers of `seats` seats, and of `nobody`.

    Attributes:
        on_host: whether they lie where the host reads and writes them.
        library: numpy there, torch elsewhere: what `arrays` are of, and its `where`.
        arrays: the buffers, as a step reads and writes them.
        ints: int64 [fields, seats + 1], see Fields.
        scale: float64 [seats + 1], what the logits are divided by.
        table: int64 [seats + 1, width], each seat's slots: forwarded tokens, then those that come; `trash` behind them.
        ids: int64 [rows, seats + 1]; logps: float64 [rows, seats + 1], NaN where the id was forced.
    """

    def __init__(self, seats: int, trash: int, device: torch.device) -> None:
        """trash: slot that belongs to no stream."""
        self.trash = trash
        self.nobody = seats
        self.on_host = device.type == "cpu"
        self.library: Any = np if self.on_host else torch
        seats += 1
        self.ints = torch.zeros((len(ROW), seats), dtype=torch.int64, device=device)
        self.scale = torch.ones(seats, dtype=torch.float64, device=device)
        self.table = torch.full((seats, ROOM), trash, dtype=torch.int64, device=device)
        self.ids = torch.zeros((ROOM, seats), dtype=torch.int64, device=device)
        self.logps = torch.zeros((ROOM, seats), dtype=torch.float64, device=device)
        self.arrays: Buffers[Array] = self._arrays()

    @property
    def buffers(self) -> Buffers[torch.Tensor]:
        """All of them: what a decode step reads and writes, but for the pool and the weights."""
        return Buffers(self.ints, self.scale, self.table, self.ids, self.logps)

    def array(self, tensor: torch.Tensor) -> Array:
        """Return a tensor on the buffers' device as an array of the library."""
        return tensor.numpy() if self.library is np else tensor

    def tensor(self, array: Array) -> torch.Tensor:
        """Return what `array` was made from."""
        return torch.from_numpy(array) if self.library is np else array

    def use_tensors(self) -> None:
        """Read and write through torch on a CPU, too: what is captured are its operations."""
        self.library = torch
        self.arrays = self._arrays()

    def _arrays(self) -> Buffers[Array]:
        return Buffers(*map(self.array, self.buffers))

    def make_room(self, width: int, tokens: int) -> None:
        """Make room for streams of `width` slots, and for turns of so many tokens. Not while a visit decodes."""
        seats, before = self.table.shape
        if width > before:
            wider = self.table.new_full((seats, _grown(before, width)), self.trash)
            wider[:, :before] = self.table
            self.table = wider
        # One row more: where the batch writes for a seat that has ended.
        rows = len(self.ids)
        if tokens + 1 > rows:
            more = (0, 0, 0, _grown(rows, tokens + 1) - rows)
            self.ids, self.logps = (torch.nn.functional.pad(drawn, more) for drawn in (self.ids, self.logps))
        self.arrays = self._arrays()

    def write(
        self, seats: np.ndarray, values: list[tuple[int, ...]], scale: list[float], rows: list[np.ndarray]
    ) -> None:
        """Set seats int64 [n]: what each has in `ints`, in the order of Fields, in `scale`, and its slots, int64 [<= width]."""
        device = self.ints.device
        at = torch.from_numpy(seats).to(device)
        # Where it lies, if the host can: else as a table of these seats, which is copied.
        here = self.on_host
        table = self.table.numpy() if here else np.empty((len(seats), self.table.shape[1]), np.int64)
        for row, slots in zip(seats.tolist() if here else range(len(seats)), rows, strict=True):
            table[row, : len(slots)] = slots
            table[row, len(slots) :] = self.trash
        self.ints[:, at] = torch.from_numpy(np.array(values, np.int64).T).to(device)
        self.scale[at] = torch.tensor(scale, dtype=torch.float64, device=device)
        if not here:
            self.table[at] = torch.from_numpy(table).to(device)

    def stop(self, seats: list[int]) -> None:
        """Stop seats whose streams are gone."""
        self.ints[ROW.running, seats] = 0


def _grown(before: int, needed: int) -> int:
    """Return the new size of a buffer: by half at least, as with it go the graphs that were captured on it."""
    return -(-max(needed, before * 3 // 2) // ROOM) * ROOM

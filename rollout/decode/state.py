"""The state of the streams that generate, in buffers on the device, where each has a seat.

A decode step (`rollout.decode.decoder`) is a function of these buffers and of nothing else. The host writes a seat when its
turn has been prefilled, and reads what was drawn once per visit.

Invariants:
* no buffer is replaced while a visit decodes; a wider table is made before, as turns begin;
* a seat that does not run is left as it is by a decode step, whatever the batch computes for it;
* `nobody`, the last seat, never runs: it fills batches up, and a step that is only tried out runs on it;
* row i of `ids` and `logps` is the seat's i-th token since the last visit, for i < EMITTED.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch


class Field(IntEnum):
    """The rows of `DecodeState.ints`.

    TOKEN: the last id, logged or drawn, that is not forwarded yet. INDEX: place in the log of the next token. POSITION: the
    position id of TOKEN. LENGTH: slots of the seat that hold forwarded tokens. COUNT: tokens of the turn so far. THINKING:
    inside the thought. RUNNING: the turn goes on. EMITTED: tokens since the last visit. THINK_BUDGET, MAX_NEW: of the
    stream's layout. SEED, GREEDY, CONTIGUOUS: of the stream.
    """

    TOKEN = 0
    INDEX = 1
    POSITION = 2
    LENGTH = 3
    COUNT = 4
    THINKING = 5
    RUNNING = 6
    EMITTED = 7
    THINK_BUDGET = 8
    MAX_NEW = 9
    SEED = 10
    GREEDY = 11
    CONTIGUOUS = 12


CHANGES = Field.EMITTED + 1
"""The first rows of `DecodeState.ints`, which a decode step writes; it only reads the others."""


class Seat(NamedTuple):
    """What the host writes of a seat when its turn has been prefilled: the rows of `ints`, in their order."""

    TOKEN: int
    INDEX: int
    POSITION: int
    LENGTH: int
    COUNT: int
    THINKING: int
    RUNNING: int
    EMITTED: int
    THINK_BUDGET: int
    MAX_NEW: int
    SEED: int
    GREEDY: int
    CONTIGUOUS: int


assert Seat._fields == tuple(Field.__members__)

TABLE_WIDTH = 64
"""Slots by which a table grows at least, and what its width is a multiple of."""


class Kinds(NamedTuple):
    """What the host knows of all rows of a batch; a decode step leaves out what none of them needs.

    Attributes:
        contiguous: whether the engine rotates any of them.
        greedy: whether all (True) or none (False) take the largest logit; None: some do.
    """

    contiguous: bool = False
    greedy: bool | None = False


class DecodeState:
    """The buffers of `seats` seats, and of `nobody`.

    Attributes:
        ints: int64 [fields, seats + 1], see Field.
        scale: float64 [seats + 1], what the logits are divided by.
        table: int64 [seats + 1, width], each seat's slots: forwarded tokens, then those that come; `trash` behind them.
        ids: int64 [rows, seats + 1]; logps: float64 [rows, seats + 1], NaN where the id was forced.
    """

    def __init__(self, seats: int, rows: int, trash: int, device: torch.device) -> None:
        """rows: the most tokens of one seat between two visits. trash: slot that belongs to no stream."""
        self.trash = trash
        self.nobody = seats
        seats += 1
        self.ints = torch.zeros((len(Field), seats), dtype=torch.int64, device=device)
        self.scale = torch.ones(seats, dtype=torch.float64, device=device)
        self.table = torch.full((seats, TABLE_WIDTH), trash, dtype=torch.int64, device=device)
        # One row more: where the batch writes for a seat that has ended.
        self.ids = torch.zeros((rows + 1, seats), dtype=torch.int64, device=device)
        self.logps = torch.zeros((rows + 1, seats), dtype=torch.float64, device=device)

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """All of them: what a decode step reads and writes, but for the pool and the weights."""
        return self.ints, self.scale, self.table, self.ids, self.logps

    def widen(self, width: int) -> None:
        """Make room for streams of `width` slots. Not while a visit decodes."""
        seats, before = self.table.shape
        if width > before:
            # By half at least: with each table go the graphs that were captured on it.
            width = -(-max(width, before * 3 // 2) // TABLE_WIDTH) * TABLE_WIDTH
            wider = self.table.new_full((seats, width), self.trash)
            wider[:, :before] = self.table
            self.table = wider

    def write(self, seats: np.ndarray, values: list[Seat], scale: list[float], rows: list[np.ndarray]) -> None:
        """Set seats int64 [n]: what each has in `ints`, `scale`, and its slots, int64 [<= width]."""
        device = self.ints.device
        table = np.full((len(seats), self.table.shape[1]), self.trash)
        for row, slots in zip(table, rows, strict=True):
            row[: len(slots)] = slots
        at = torch.from_numpy(seats).to(device)
        self.ints[:, at] = torch.from_numpy(np.array(values, np.int64).T).to(device)
        self.scale[at] = torch.tensor(scale, dtype=torch.float64, device=device)
        self.table[at] = torch.from_numpy(table).to(device)

    def stop(self, seats: list[int]) -> None:
        """Stop seats whose streams are gone."""
        self.ints[Field.RUNNING, seats] = 0

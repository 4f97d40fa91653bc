"""What a turn is shown, as it goes into the log: runs of tokens of one lane.

Invariants: arrays cannot be written, as runs that look alike are one object; a run is one segment of the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from streams.log.record import Kind
from streams.positions.mrope import Shape


@dataclass(frozen=True)
class Part:
    """A run of prefilled tokens of one kind.

    Attributes:
        ids: int32 [n]. n may be 0 for a vision block of which every token was dropped: its grid still moves the
            positions.
        grid: (time, rows, columns) of a VIDEO run, from which its positions follow; None for text.
        keep: the cells of that grid that were kept, ascending; None for all.
    """

    ids: np.ndarray
    kind: Kind
    grid: tuple[int, int, int] | None = None
    keep: tuple[int, ...] | None = None
    lane: int = 0


@dataclass(frozen=True)
class Run:
    """Consecutive parts of one lane.

    Attributes:
        ids, kinds: int32 [n], int8 [n].
        shapes: what their positions are made from.
        of_kind: see `runs_of`.
    """

    lane: int
    ids: np.ndarray
    kinds: np.ndarray
    shapes: tuple[Shape, ...]
    of_kind: tuple[tuple[int, int, int], ...]


def runs_of(kinds: bytes) -> tuple[tuple[int, int, int], ...]:
    """Return (kind, start, count) of neighbouring tokens of one kind; kinds: one byte a token."""
    runs, n, left = [], len(kinds), kinds
    while left:
        rest = left.lstrip(left[:1])
        runs.append((left[0], n - len(left), len(left) - len(rest)))
        left = rest
    return tuple(runs)


def joined(parts: Sequence[Part]) -> tuple[Run, ...]:
    """Return one Run for every run of parts of one lane, in order."""
    runs = []
    for lane, group in groupby(parts, key=lambda part: part.lane):
        same = list(group)
        ids = np.concatenate([part.ids for part in same])
        ids.setflags(write=False)
        # Bytes are read-only, too, and several times faster here than np.repeat.
        kinds = b"".join([bytes((part.kind,)) * len(part.ids) for part in same])
        shapes = tuple([len(part.ids) if part.grid is None else (part.grid, part.keep) for part in same])
        runs.append(Run(lane, ids, np.frombuffer(kinds, np.int8), shapes, runs_of(kinds)))
    return tuple(runs)

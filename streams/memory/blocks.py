"""The live tokens of a stream, as blocks: what was appended together, in runs of tokens of one kind.

A turn is two blocks and a handful of runs, so what a policy asks of hundreds of tokens is mostly asked of few runs.

Invariants:
* blocks are in log order, and none is empty;
* columns are made from them when they are asked for, and show what was live then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from streams.log.record import Kind

KindRun = tuple[int, int, int]
"""The kind of tokens that follow one another in a block, the place of the first in it, and how many they are."""
_END = int(Kind.END)  # numpy takes members of an IntEnum, but several times as long as plain numbers


# Few and large: Python's garbage collector looks at each of them again and again.
class Block(NamedTuple):
    """Tokens of one turn and lane that were appended together, some of which may have left.

    Attributes:
        turn, lane: of all.
        runs: those that are live, ascending, none empty.
        first: log index of the one at place 0.
        ordinal: of the one at place 0 among the generated text of the stream, if they were generated; else -1.
        ids: int [n]. positions: native ones, int [3, n]. By place.
    """

    turn: int
    lane: int
    runs: tuple[KindRun, ...]
    first: int
    ordinal: int
    ids: np.ndarray
    positions: np.ndarray

    def ordinal_of(self, run: KindRun) -> int:
        """Return the ordinal of a run's first token, whose others follow it; -1: they are no generated text, as END."""
        kind, start, _ = run
        return -1 if self.ordinal < 0 or kind == _END else self.ordinal + start


class LiveTokens:
    """The live tokens of a stream, in log order. Its columns are int32 [n], to be read only.

    Attributes:
        blocks: they, in order.
        kind, turn, ids: of each token.
        index: place in the log.
        ordinal: place among the generated text (thoughts, decisions, responses) of the whole stream, -1 for any other token.
    """

    __slots__ = ("_blocks", "_count", "_made")

    def __init__(
        self, kind: np.ndarray, turn: np.ndarray, ids: np.ndarray, index: np.ndarray, ordinal: np.ndarray
    ) -> None:
        """Make them from columns, int [n] each."""
        self._made = {"kind": kind, "turn": turn, "ids": ids, "index": index, "ordinal": ordinal}
        self._count = len(kind)
        self._blocks: Sequence[Block] | None = None

    @classmethod
    def of(cls, blocks: Sequence[Block], count: int) -> LiveTokens:
        """Make them from blocks with `count` live tokens in all."""
        live = cls.__new__(cls)
        live._made, live._count, live._blocks = {}, count, blocks
        return live

    def __len__(self) -> int:
        return self._count

    @property
    def blocks(self) -> Sequence[Block]:
        if self._blocks is None:
            self._blocks = self._cut()
        return self._blocks

    @property
    def runs(self) -> Iterator[tuple[Block, KindRun]]:
        """Every run, with its block."""
        return ((block, run) for block in self.blocks for run in block.runs)

    @property
    def kind(self) -> np.ndarray:
        return self.column("kind")

    @property
    def turn(self) -> np.ndarray:
        return self.column("turn")

    @property
    def ids(self) -> np.ndarray:
        return self.column("ids")

    @property
    def index(self) -> np.ndarray:
        return self.column("index")

    @property
    def ordinal(self) -> np.ndarray:
        return self.column("ordinal")

    def column(self, name: str) -> np.ndarray:
        """Return one of the columns; of blocks also `lane`, and `position`: the smallest of a token's native ones."""
        if name not in self._made:
            made = _COLUMNS[name](list(self.runs))
            made.setflags(write=False)
            self._made[name] = made
        return self._made[name]

    def _cut(self) -> list[Block]:
        """Return the blocks of columns: one for each run of tokens of one kind and turn that follow one another."""
        kind, turn, ids, index, ordinal = self._made.values()
        if not len(kind):
            return []
        text = ordinal >= 0
        follows = (np.diff(kind) == 0) & (np.diff(turn) == 0) & (np.diff(index) == 1)
        follows &= np.where(text[1:], np.diff(ordinal) == 1, ~text[:-1])
        starts = [0, *((~follows).nonzero()[0] + 1).tolist()]
        # Columns do not say where a token stands in the model.
        nowhere = np.zeros((3, 0), np.int32)
        return [
            Block(int(turn[a]), 0, ((int(kind[a]), 0, b - a),), int(index[a]), int(ordinal[a]), ids[a:b], nowhere)
            for a, b in zip(starts, [*starts[1:], len(kind)], strict=True)
        ]


Column = Callable[[Sequence[tuple[Block, KindRun]]], np.ndarray]


def _repeated(number: Callable[[Block, KindRun], int]) -> Column:
    """Return what makes the column of a number that all tokens of a run have alike."""

    def column(runs: Sequence[tuple[Block, KindRun]]) -> np.ndarray:
        return np.array([number(*run) for run in runs], np.int32).repeat([size for _, (_, _, size) in runs])

    return column


def _counting(first: Callable[[Block, KindRun], int]) -> Column:
    """Return what makes the column of a number that grows by one from token to token of a run; -1 stays."""

    def column(runs: Sequence[tuple[Block, KindRun]]) -> np.ndarray:
        return _joined([_from(first(block, run), run[2]) for block, run in runs])

    return column


def _from(first: int, size: int) -> np.ndarray:
    return np.full(size, -1, np.int32) if first < 0 else np.arange(first, first + size, dtype=np.int32)


def _ids(runs: Sequence[tuple[Block, KindRun]]) -> np.ndarray:
    return _joined([block.ids[start : start + size] for block, (_, start, size) in runs])


def _position(runs: Sequence[tuple[Block, KindRun]]) -> np.ndarray:
    return _joined([np.minimum.reduce(block.positions[:, start : start + size]) for block, (_, start, size) in runs])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32, copy=False)


_COLUMNS: dict[str, Column] = {
    "kind": _repeated(lambda _, run: run[0]),
    "turn": _repeated(lambda block, _: block.turn),
    "index": _counting(lambda block, run: block.first + run[1]),
    "ordinal": _counting(Block.ordinal_of),
    "ids": _ids,
    "position": _position,
    "lane": _repeated(lambda block, _: block.lane),
}

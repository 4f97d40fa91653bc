"""The live tokens of a stream, as spans: tokens of one kind and turn that follow one another in the log.

A turn is a handful of spans, so what a policy asks of hundreds of tokens is mostly asked of few spans.

Invariants:
* spans are in log order, and none is empty;
* columns are made from them when they are asked for, and show what was live then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """Tokens that were appended together, some of which may have left.

    Attributes:
        first: log index of the first.
        ids: int [n]. positions: native ones, int [3, n].
        lane: of all.
    """

    first: int
    ids: np.ndarray
    positions: np.ndarray
    lane: int


class Span(NamedTuple):
    """`size` tokens of one kind and turn, log indices from `first` on.

    Attributes:
        ordinal: place of the first among the generated text of the stream, whose others follow it; -1: they are no such text.
        block: what they were appended with.
    """

    kind: int
    turn: int
    first: int
    size: int
    ordinal: int
    block: Block

    def part(self, start: int, stop: int) -> Span:
        """Return the tokens [start, stop) of this span."""
        ordinal = self.ordinal if self.ordinal < 0 else self.ordinal + start
        return Span(self.kind, self.turn, self.first + start, stop - start, ordinal, self.block)


class LiveTokens:
    """The live tokens of a stream, in log order. Its columns are int32 [n], to be read only.

    Attributes:
        spans: they, in order.
        kind, turn, ids: of each token.
        index: place in the log.
        ordinal: place among the generated text (thoughts, decisions, responses) of the whole stream, -1 for any other token.
    """

    __slots__ = ("_count", "_made", "_spans")

    def __init__(
        self, kind: np.ndarray, turn: np.ndarray, ids: np.ndarray, index: np.ndarray, ordinal: np.ndarray
    ) -> None:
        """Make them from columns, int [n] each."""
        self._made = {"kind": kind, "turn": turn, "ids": ids, "index": index, "ordinal": ordinal}
        self._count = len(kind)
        self._spans: Sequence[Span] | None = None

    @classmethod
    def of(cls, spans: Sequence[Span], count: int) -> LiveTokens:
        """Make them from spans of `count` tokens in all."""
        live = cls.__new__(cls)
        live._made, live._count, live._spans = {}, count, spans
        return live

    def __len__(self) -> int:
        return self._count

    @property
    def spans(self) -> Sequence[Span]:
        if self._spans is None:
            self._spans = self._cut()
        return self._spans

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
        """Return one of the columns, int32 [n]; of those made from spans also `lane`, and `position`: the smallest of three."""
        if name not in self._made:
            made = _COLUMNS[name](self.spans)
            made.setflags(write=False)
            self._made[name] = made
        return self._made[name]

    def _cut(self) -> list[Span]:
        """Return the spans of columns."""
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
            Span(
                int(kind[a]),
                int(turn[a]),
                int(index[a]),
                b - a,
                int(ordinal[a]),
                Block(int(index[a]), ids[a:b], nowhere, 0),
            )
            for a, b in zip(starts, [*starts[1:], len(kind)], strict=True)
        ]


def _repeated(number: Callable[[Span], int]) -> Callable[[Sequence[Span]], np.ndarray]:
    """Return what makes the column of a number that all tokens of a span have alike."""

    def column(spans: Sequence[Span]) -> np.ndarray:
        return np.array([number(span) for span in spans], np.int32).repeat([span.size for span in spans])

    return column


def _counting(first: Callable[[Span], int]) -> Callable[[Sequence[Span]], np.ndarray]:
    """Return what makes the column of a number that grows by one from token to token of a span; -1 stays."""

    def column(spans: Sequence[Span]) -> np.ndarray:
        return _joined([_from(first(span), span.size) for span in spans])

    return column


def _from(first: int, size: int) -> np.ndarray:
    return np.full(size, -1, np.int32) if first < 0 else np.arange(first, first + size, dtype=np.int32)


def _ids(spans: Sequence[Span]) -> np.ndarray:
    return _joined([span.block.ids[_place(span)] for span in spans])


def _position(spans: Sequence[Span]) -> np.ndarray:
    return _joined([np.minimum.reduce(span.block.positions[:, _place(span)]) for span in spans])


def _place(span: Span) -> slice:
    """Return where a span is in its block."""
    start = span.first - span.block.first
    return slice(start, start + span.size)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32, copy=False)


_COLUMNS: dict[str, Callable[[Sequence[Span]], np.ndarray]] = {
    "kind": _repeated(lambda span: span.kind),
    "turn": _repeated(lambda span: span.turn),
    "index": _counting(lambda span: span.first),
    "ordinal": _counting(lambda span: span.ordinal),
    "ids": _ids,
    "position": _position,
    "lane": _repeated(lambda span: span.block.lane),
}

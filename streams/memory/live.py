"""What a stream keeps between turns: its live tokens, and a few numbers for every turn.

The writer keeps both beside the log, so that an eviction reads the live tokens and never the whole log.

Invariants:
* live tokens are in log order;
* the numbers of a turn are written when it starts (`closed_in`: when its query closes).
"""

from __future__ import annotations

import numpy as np

from streams.log.record import NEVER
from streams.memory.blocks import Block, KindRun, LiveTokens
from streams.memory.policy import TurnStart
from streams.memory.rows import Range, Rows, add_range

_VIDEO_TURNS, _GENERATED, _CLOSED_IN = range(3)
_LEAST = 64
"""Turns that there is room for at first."""
_BLOCK_BYTES, _RUN_BYTES = 350, 110
"""What Python takes for a block beside the numbers of its tokens, and for a run, about."""


class LiveSet:
    """The tokens that the next one may attend to, its lane permitting."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._count = 0
        self._tokens: LiveTokens | None = None  # as they are, until they change

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, and of all that was appended with what is left."""
        held = sum(block.ids.nbytes + block.positions.nbytes for block in self._blocks)
        return held + sum(_BLOCK_BYTES + _RUN_BYTES * len(block.runs) for block in self._blocks)

    def column(self, name: str) -> np.ndarray:
        """Return one column of LiveTokens, or `lane`, or `position`: the smallest of a token's native position ids."""
        return self.tokens().column(name)

    def append(
        self,
        first: int,
        ids: np.ndarray,
        positions: np.ndarray,
        runs: tuple[KindRun, ...],
        *,
        turn: int,
        ordinal: int = -1,
        lane: int = 0,
    ) -> None:
        """Add tokens with log indices from `first` on. Arrays are kept, and must not be written any more.

        Args:
            ids, positions: int [n], [3, n].
            runs: those of one kind, see `streams.layout.runs.runs_of`.
            ordinal: of the first, where they were generated; END, which comes last, has none. -1: they were not.
        """
        if runs:
            self._blocks.append(Block(turn, lane, runs, first, ordinal, ids, positions))
            self._count += len(ids)
            self._tokens = None

    def tokens(self) -> LiveTokens:
        """Return them as a policy sees them; what is appended or dropped later does not show."""
        if self._tokens is None:
            self._tokens = LiveTokens.of(tuple(self._blocks), self._count)
        return self._tokens

    def drop(self, rows: Rows) -> list[Range]:
        """Drop the tokens in these rows. Returns their log indices, as ranges."""
        if not rows.ranges:
            return []
        kept: list[Block] = []
        left: list[Range] = []
        todo = iter(rows.ranges)
        start, stop = next(todo)
        row = 0
        for number, block in enumerate(self._blocks):
            if start == NEVER:
                kept += self._blocks[number:]
                break
            runs: list[KindRun] = []
            for run in block.runs:
                kind, place, size = run
                end = row + size
                at = row  # what is before it is kept or dropped
                while start < end:
                    if start > at:
                        runs.append((kind, place + at - row, start - at))
                        at = start
                    upto = min(stop, end)
                    add_range(left, block.first + place + at - row, block.first + place + upto - row)
                    at = upto
                    if stop > end:
                        break
                    start, stop = next(todo, (NEVER, NEVER))
                if at < end:
                    runs.append(run if at == row else (kind, place + at - row, end - at))
                row = end
            if runs:
                now = tuple(runs)
                kept.append(block if now == block.runs else block._replace(runs=now))
        assert start == NEVER, "only live tokens are dropped"
        self._blocks, self._tokens = kept, None
        self._count -= rows.count
        return left


class TurnHistory:
    """The numbers of every turn that a TurnStart gives to policies: 12 bytes a turn."""

    def __init__(self) -> None:
        self._turns = 0
        self._columns = np.empty((3, _LEAST), np.int32)
        self._readable = _read_only(self._columns)
        self._open: list[int] = []
        self._until = -1  # the latest turn that closes a query by itself
        self._video_turns = 0

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def begin(self, *, has_video: bool, video_tokens: int, generated: int) -> TurnStart:
        """Start the next turn. generated: generated text tokens of the turns before it."""
        turn = self._turns
        if turn == self._columns.shape[1]:
            self._columns = np.concatenate((self._columns, np.empty_like(self._columns)), axis=1)
            self._readable = _read_only(self._columns)
        columns, readable = self._columns, self._readable
        columns[_VIDEO_TURNS, turn] = self._video_turns
        columns[_GENERATED, turn] = generated
        columns[_CLOSED_IN, turn] = NEVER
        self._turns = turn + 1
        self._video_turns += has_video
        return TurnStart(
            turn,
            has_video,
            video_tokens,
            readable[_VIDEO_TURNS, : turn + 1],
            readable[_GENERATED, : turn + 1],
            readable[_CLOSED_IN, :turn],
            bool(self._open) or self._until >= turn,
        )

    def ask(self, until: int | None) -> None:
        """Record that the latest turn has a query, closed in turn `until` or (None) by a response."""
        turn = self._turns - 1
        if until is None:
            self._open.append(turn)
        else:
            self._columns[_CLOSED_IN, turn] = until
            self._until = max(self._until, until)

    def answered(self) -> None:
        """Record that the latest turn responded, which closes every query that waits for a response."""
        if self._open:
            self._columns[_CLOSED_IN, self._open] = self._turns - 1
            self._open.clear()


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view

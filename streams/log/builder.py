"""Builds a StreamLog token by token, whole or in pieces.

Invariants:
* tokens are only appended, and turns and segments never decrease;
* an expiry is only lowered, and only to the start of a segment that has not begun;
* what tokens that were appended together have in common is kept once for all of them;
* a token was sampled exactly if it has a log-prob;
* pieces are consecutive, and what was handed out is no longer held.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.log.columns import Columns, Spec
from streams.log.record import _COLUMNS, NEVER, ChunkRecord, LogHeader, StreamLog
from streams.positions.regions import RegionBook, RegionLog

_IN_COMMON = ("turn", "segment", "lane", "version")
"""What all tokens of one append have alike."""
_OWN = Spec(
    {name: dtype for name, dtype in _COLUMNS.items() if name not in (*_IN_COMMON, "sampled")},
    {"expiry": NEVER, "target": False, "behaviour_logp": np.nan},
)
"""What each token has for itself. Whether it was sampled is told by its log-prob."""
_APPEND_BYTES = 160
"""What an append takes for what its tokens have in common, about: five numbers and the tuple of four of them."""


@dataclass(frozen=True)
class LogPiece:
    """Consecutive tokens of a log, handed out before its stream has ended; `streams.log.pieces` joins them.

    Attributes:
        stream_id: the stream that it belongs to.
        number: 0, 1, ... within the stream.
        first: log index of its first token.
        last: the stream ended with this piece.
        header: in piece 0 only.
        columns: the columns of StreamLog, by name.
        chunks: the chunks of video appended since the piece before.
        amended, amended_expiry: [A], log indices of tokens in earlier pieces whose expiry was lowered since, and the
            new expiry of each.
        regions: moves and turns since the piece before, for a contiguous stream.
    """

    stream_id: str
    number: int
    first: int
    last: bool
    header: LogHeader | None
    columns: dict[str, np.ndarray]
    chunks: tuple[ChunkRecord, ...]
    amended: np.ndarray
    amended_expiry: np.ndarray
    regions: RegionLog | None = None

    def __len__(self) -> int:
        return len(self.columns["ids"])


@dataclass
class LogBuilder:
    """Grows a StreamLog, or hands it out in pieces and keeps only the tokens since, from log index `first` on.

    Attributes:
        regions: the regions of a stream with contiguous positions.
        length: tokens appended so far, those handed out included.
        first: log index of the first token that is still held.
    """

    header: LogHeader
    regions: RegionBook | None = None
    length: int = 0
    first: int = 0
    _columns: Columns = field(default_factory=lambda: Columns(_OWN))
    # Of every append: the log index of its first token, and what its tokens have in common.
    _firsts: list[int] = field(default_factory=list)
    _common: list[tuple[int, int, int, int]] = field(default_factory=list)
    _chunks: list[ChunkRecord] = field(default_factory=list)
    _segment: int = -1
    _turn: int = 0
    _pieces: int = 0
    _amended: list[tuple[np.ndarray, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens, amendments and regions."""
        regions = 0 if self.regions is None else self.regions.nbytes
        amended = sum(indices.nbytes for indices, _ in self._amended)
        return self._columns.nbytes + _APPEND_BYTES * len(self._firsts) + amended + regions

    def column(self, name: str, start: int = 0) -> np.ndarray:
        """Return one column from log index `start` on, which must not have been handed out; to be read only."""
        assert start >= self.first, f"tokens before {self.first} were handed out"
        if name in _IN_COMMON:
            return self._repeated(start, self.length)[name]
        if name == "sampled":
            return ~np.isnan(self.column("behaviour_logp", start))
        return self._columns.column(name)[start - self.first :]

    def positions_between(self, start: int, stop: int) -> np.ndarray:
        """Return the native positions int32 [3, n] of the tokens in [start, stop)."""
        return self.column("positions", start)[: stop - start].T

    def begin_segment(self) -> int:
        """Start a new segment with the next append. Returns the log index at which it begins."""
        self._segment += 1
        return self.length

    def add_chunk(self, chunk: ChunkRecord) -> None:
        self._chunks.append(chunk)

    def append(
        self,
        ids: np.ndarray | list[int],
        kind: np.ndarray | int,
        positions: np.ndarray,
        *,
        turn: int,
        version: int,
        lane: int = 0,
        target: np.ndarray | bool = False,
        logp: np.ndarray | float | None = None,
    ) -> slice:
        """Append tokens to the current segment; positions int [3, n]; others [n], or one for all. Returns their log indices.

        logp: NaN for a token that was not sampled; None: none was.
        """
        assert self._segment >= 0, "append before begin_segment"
        assert turn >= self._turn, "turns never decrease"
        at = slice(self.length, self.length + len(ids))
        self._turn = turn
        own: dict[str, np.ndarray | float] = {}
        if target is not False:
            own["target"] = target
        if logp is not None:
            own["behaviour_logp"] = logp
        self._columns.append(len(ids), ids=ids, kind=kind, positions=positions.T, **own)
        self._firsts.append(self.length)
        self._common.append((turn, self._segment, lane, version))
        self.length = at.stop
        return at

    def expire(self, indices: np.ndarray) -> None:
        """Lower the expiry of `indices`, int [n] ascending, to the start of the next segment, which has not begun."""
        if not len(indices):
            return
        assert indices[-1] < self.length, "only logged tokens expire"
        held = indices
        if self.first:
            # Their piece is written already: the next one carries the new expiry, and `join_pieces` applies it.
            early = int(indices.searchsorted(self.first))
            if early:
                self._amended.append((indices[:early], self.length))
            held = indices[early:] - self.first
        assert not np.count_nonzero(self._columns.column("expiry")[held] < self.length), "expiry is never raised"
        self._columns.write("expiry", held, self.length)

    def cut(self, stop: int, *, last: bool = False) -> LogPiece:
        """Return the held tokens before log index `stop` as a piece, and drop them. last: the stream has ended."""
        assert self.first <= stop <= self.length, "only what is held is handed out"
        assert stop == self.length or not last, "the last piece holds all there is"
        amended, self._amended = self._amended, []
        piece = LogPiece(
            stream_id=self.header.stream_id,
            number=self._pieces,
            first=self.first,
            last=last,
            header=None if self._pieces else self.header,
            columns=self._hand_out(stop),
            chunks=tuple(self._chunks),
            amended=np.concatenate([np.zeros(0, np.int64), *(indices for indices, _ in amended)]),
            amended_expiry=np.repeat(
                np.array([expiry for _, expiry in amended], np.int32), [len(indices) for indices, _ in amended]
            ),
            regions=None if self.regions is None else self.regions.cut(),
        )
        self._chunks.clear()
        self._pieces += 1
        self.first = stop
        return piece

    def finish(self) -> StreamLog:
        """Return the whole log; nothing may have been handed out."""
        columns = _as_logged(
            {name: self.column(name).copy() for name in _OWN} | self._repeated(self.first, self.length)
        )
        regions = None if self.regions is None else self.regions.log()
        return StreamLog(header=self.header, chunks=tuple(self._chunks), regions=regions, **columns)

    def _hand_out(self, stop: int) -> dict[str, np.ndarray]:
        """Return the columns of the held tokens before log index `stop`, and drop them."""
        common = self._repeated(self.first, stop)
        # An append that was cut in two is still needed for the tokens that stay.
        gone = bisect_right(self._firsts, stop) - (stop < self.length)
        del self._firsts[:gone], self._common[:gone]
        return _as_logged(self._columns.cut(stop - self.first) | common)

    def _repeated(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return the columns that tokens have in common, for those in [start, stop)."""
        first, last = max(0, bisect_right(self._firsts, start) - 1), bisect_left(self._firsts, stop)
        counts = np.diff([start, *self._firsts[first + 1 : last], stop])[: last - first]
        values = np.array(self._common[first:last], np.int32).reshape(-1, len(_IN_COMMON)).repeat(counts, axis=0)
        return {name: values[:, i].astype(_COLUMNS[name]) for i, name in enumerate(_IN_COMMON)}


def _as_logged(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    # Columns grow along their first axis, [n, 3]; a StreamLog has positions as [3, n].
    positions = np.ascontiguousarray(columns["positions"].T)
    return columns | {"positions": positions, "sampled": ~np.isnan(columns["behaviour_logp"])}

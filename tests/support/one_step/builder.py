"""Builds a StreamLog token by token, whole or in pieces.

Invariants (asserted):
* tokens are only appended, and turns and segments never decrease;
* an expiry is only lowered, and only to the start of a segment that has not begun;
* a token has a log-prob exactly if it was sampled;
* pieces are consecutive, and what was handed out is no longer held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.log.builder import LogPiece
from streams.log.record import _COLUMNS, NEVER, ChunkRecord, LogHeader, StreamLog
from streams.positions.regions import RegionBook
from tests.support.one_step.columns import Columns


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
    _columns: Columns = field(default_factory=lambda: Columns(_COLUMNS))
    _chunks: list[ChunkRecord] = field(default_factory=list)
    _segment: int = -1
    _turn: int = 0
    _pieces: int = 0
    _amended: list[tuple[np.ndarray, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens, amendments and regions."""
        regions = 0 if self.regions is None else self.regions.nbytes
        return self._columns.nbytes + sum(indices.nbytes for indices, _ in self._amended) + regions

    def column(self, name: str, start: int = 0) -> np.ndarray:
        """Return a read-only view of one column from log index `start` on, which must not have been handed out."""
        assert start >= self.first, f"tokens before {self.first} were handed out"
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
        sampled: bool = False,
        target: bool = False,
        logp: float = float("nan"),
    ) -> slice:
        """Append tokens to the current segment; positions int [3, n]. Returns their log indices."""
        assert self._segment >= 0, "append before begin_segment"
        assert turn >= self._turn, "turns never decrease"
        # logp == logp is False for NaN alone.
        assert sampled == (logp == logp), "a sampled token has a log-prob, any other has none"
        at = slice(self.length, self.length + len(ids))
        self._turn = turn
        self._columns.append(
            len(ids),
            ids=ids,
            kind=kind,
            turn=turn,
            segment=self._segment,
            lane=lane,
            positions=positions.T,
            expiry=NEVER,
            sampled=sampled,
            target=target,
            behaviour_logp=logp,
            version=version,
        )
        self.length = at.stop
        return at

    def expire(self, indices: np.ndarray) -> None:
        """Lower the expiry of `indices` to the start of the next segment, which has not begun."""
        if not len(indices):
            return
        assert indices.max() < self.length, "only logged tokens expire"
        # Their piece is written already: the next one carries the new expiry, and `join_pieces` applies it.
        early = indices < self.first
        if early.any():
            self._amended.append((indices[early], self.length))
        held = indices[~early] - self.first
        assert (self._columns.column("expiry")[held] >= self.length).all(), "expiry is never raised"
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
            columns=_as_logged(self._columns.cut(stop - self.first)),
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
        columns = _as_logged({name: self.column(name).copy() for name in _COLUMNS})
        regions = None if self.regions is None else self.regions.log()
        return StreamLog(header=self.header, chunks=tuple(self._chunks), regions=regions, **columns)


def _as_logged(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    # Columns grow along their first axis, [n, 3]; a StreamLog has positions as [3, n].
    return columns | {"positions": np.ascontiguousarray(columns["positions"].T)}

"""Builds a StreamLog append by append, whole or in pieces.

Invariants:
* tokens are only appended, and turns and segments never decrease;
* what is appended is kept as it was given, and joined when the log is read: an append costs no more late than early;
* an expiry is only lowered, and only to the start of a segment that has not begun;
* a token was sampled exactly if it has a log-prob;
* pieces are consecutive, and what was handed out is no longer held.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np

from streams.log.record import _COLUMNS, NEVER, ChunkRecord, LogHeader, StreamLog
from streams.positions.regions import RegionBook, RegionLog


class _Append(NamedTuple):
    """Tokens that were appended together.

    Attributes:
        first: log index of the first.
        ids: int32 [n]. kind: int8 [n]. positions: int32 [3, n].
        target: bool [n]. behaviour_logp: float64 [n], NaN for a token that was not sampled. None: of none.
        turn, segment, lane, version: of all.
    """

    first: int
    ids: np.ndarray
    kind: np.ndarray
    positions: np.ndarray
    target: np.ndarray | None
    behaviour_logp: np.ndarray | None
    turn: int
    segment: int
    lane: int
    version: int

    def column(self, name: str) -> np.ndarray:
        """Return one column of these tokens; only `expiry` is not known here."""
        if name == "sampled":
            logp = self.behaviour_logp
            return np.zeros(len(self.ids), bool) if logp is None else ~np.isnan(logp)
        value = getattr(self, name)
        if isinstance(value, np.ndarray):
            return value
        if value is None:
            value = np.nan if name == "behaviour_logp" else False
        return np.full(len(self.ids), value, _COLUMNS[name])

    def rows(self, start: int, stop: int) -> _Append:
        """Return those with log indices in [start, stop)."""
        if start <= self.first and stop >= self.first + len(self.ids):
            return self
        at = slice(max(0, start - self.first), stop - self.first)
        return self._replace(
            first=max(start, self.first),
            ids=self.ids[at],
            kind=self.kind[at],
            positions=self.positions[:, at],
            target=None if self.target is None else self.target[at],
            behaviour_logp=None if self.behaviour_logp is None else self.behaviour_logp[at],
        )

    @property
    def nbytes(self) -> int:
        arrays = (self.ids, self.kind, self.positions, self.target, self.behaviour_logp)
        return sum(array.nbytes for array in arrays if array is not None) + _APPEND_BYTES


_IN_COMMON = _Append._fields[-4:]
"""What all tokens of one append have alike."""
_first = itemgetter(0)
_APPEND_BYTES = 800
"""What Python takes for an append beside the numbers of its tokens, about: a tuple, five arrays' heads, five numbers."""

_EXPIRY_BYTES = 160
"""What it takes for a range of tokens that expired together, about."""


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
    _appends: list[_Append] = field(default_factory=list)
    # Tokens that have expired, log indices [first, stop), and at which index; those in `_amended` are handed out.
    _expired: list[tuple[int, int, int]] = field(default_factory=list)
    _amended: list[tuple[int, int, int]] = field(default_factory=list)
    _chunks: list[ChunkRecord] = field(default_factory=list)
    _segment: int = -1
    _turn: int = 0
    _pieces: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are held, of expiries and regions."""
        regions = 0 if self.regions is None else self.regions.nbytes
        expired = _EXPIRY_BYTES * (len(self._expired) + len(self._amended))
        return sum(append.nbytes for append in self._appends) + expired + regions

    def column(self, name: str, start: int = 0) -> np.ndarray:
        """Return one column from log index `start` on, which must not have been handed out; positions as [3, n].

        To be read only.
        """
        assert start >= self.first, f"tokens before {self.first} were handed out"
        if name == "expiry":
            return self._expiry(self.length)[start - self.first :]
        if self._appends and start >= (last := self._appends[-1]).first:
            return last.column(name)[..., start - last.first :]
        parts = [append.column(name) for append in self._between(start, self.length)]
        return np.concatenate(parts or [_none(name)], axis=-1)

    def begins(self, turn: int) -> int:
        """Return the log index of the first held token of a turn, or of a later one."""
        at = bisect_left(self._appends, turn, key=attrgetter("turn"))
        return self._appends[at].first if at < len(self._appends) else self.length

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

        Arrays are kept, and must not be written any more. logp: NaN for a token that was not sampled; None: none was.
        """
        assert self._segment >= 0, "append before begin_segment"
        assert turn >= self._turn, "turns never decrease"
        at = slice(self.length, self.length + len(ids))
        self._turn = turn
        count = len(ids)
        assert positions.shape == (3, count), "a token has three positions"
        self._appends.append(
            _Append(
                self.length,
                np.asarray(ids, np.int32),
                _of_all(kind, count, np.int8),
                np.asarray(positions, np.int32),
                None if target is False else _of_all(target, count, np.bool_),
                None if logp is None else _of_all(logp, count, np.float64),
                turn,
                self._segment,
                lane,
                version,
            )
        )
        self.length = at.stop
        return at

    def expire(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Lower the expiry of log indices [first, stop), ascending, to the start of the next segment, which has not begun."""
        for first, stop in ranges:
            assert stop <= self.length, "only logged tokens expire"
            if first < self.first:
                # Their piece is written already: the next one carries the new expiry, and `join_pieces` applies it.
                self._amended.append((first, min(stop, self.first), self.length))
                first = self.first
            if first < stop:
                self._expired.append((first, stop, self.length))

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
            amended=np.concatenate([np.zeros(0, np.int64), *(np.arange(first, stop) for first, stop, _ in amended)]),
            amended_expiry=np.repeat(
                np.array([at for _, _, at in amended], np.int32), [stop - first for first, stop, _ in amended]
            ),
            regions=None if self.regions is None else self.regions.cut(),
        )
        self._chunks.clear()
        self._pieces += 1
        self.first = stop
        return piece

    def finish(self) -> StreamLog:
        """Return the whole log; nothing may have been handed out."""
        assert not self.first, f"tokens before {self.first} were handed out"
        regions = None if self.regions is None else self.regions.log()
        return StreamLog(
            header=self.header, chunks=tuple(self._chunks), regions=regions, **self._columns_until(self.length)
        )

    def _hand_out(self, stop: int) -> dict[str, Any]:
        """Return the columns of the held tokens before log index `stop`, and drop them."""
        columns = self._columns_until(stop)
        self._appends = self._between(stop, self.length)
        self._expired = [(max(first, stop), end, at) for first, end, at in self._expired if end > stop]
        return columns

    def _columns_until(self, stop: int) -> dict[str, Any]:
        """Return the columns of the held tokens before log index `stop`, as copies."""
        appends = self._between(self.first, stop)
        columns = {
            name: np.concatenate([_none(name), *(getattr(append, name) for append in appends)], axis=-1)
            for name in ("ids", "kind", "positions")
        }
        counts = [len(append.ids) for append in appends]
        common = np.array([append[-len(_IN_COMMON) :] for append in appends], np.int32).reshape(-1, len(_IN_COMMON))
        for name, values in zip(_IN_COMMON, common.T, strict=True):
            columns[name] = values.astype(_COLUMNS[name]).repeat(counts)
        # What no token of an append has is cut from one array for all of them.
        most = max(counts, default=0)
        without, unsampled = np.zeros(most, bool), np.full(most, np.nan)
        target = np.concatenate(
            [without[:0], *[without[: len(a.ids)] if a.target is None else a.target for a in appends]]
        )
        logp = np.concatenate(
            [
                unsampled[:0],
                *[unsampled[: len(a.ids)] if a.behaviour_logp is None else a.behaviour_logp for a in appends],
            ]
        )
        return columns | {
            "target": target,
            "behaviour_logp": logp,
            "sampled": ~np.isnan(logp),
            "expiry": self._expiry(stop),
        }

    def _expiry(self, stop: int) -> np.ndarray:
        """Return the expiry of the held tokens before log index `stop`, int32 [n]."""
        expiry = np.full(stop - self.first, NEVER, np.int32)
        lowered = 0
        for first, end, at in self._expired:
            if first < stop:
                expiry[first - self.first : min(end, stop) - self.first] = at
                lowered += min(end, stop) - first
        assert lowered == np.count_nonzero(expiry != NEVER), "expiry is never raised"
        return expiry

    def _between(self, start: int, stop: int) -> list[_Append]:
        """Return the tokens with log indices in [start, stop), append by append."""
        if start >= stop:
            return []
        first = bisect_right(self._appends, start, key=_first) - 1
        last = bisect_left(self._appends, stop, lo=first, key=_first)
        return [append.rows(start, stop) for append in self._appends[first:last]]


def _none(name: str) -> np.ndarray:
    """Return a column of no tokens."""
    return np.zeros((3, 0) if name == "positions" else 0, _COLUMNS[name].base)


def _of_all(value: np.ndarray | float, count: int, dtype: type[np.generic]) -> np.ndarray:
    """Return one value for each token, [count]."""
    assert not isinstance(value, np.ndarray) or len(value) == count, "every token has one value"
    return np.asarray(value, dtype) if isinstance(value, np.ndarray) else np.full(count, value, dtype)

"""StreamLog: the record of what was done to one stream, token by token, in append order.

It is the only thing the learner trains from, and the one contract between rollout and learner.
Invariants (asserted by LogBuilder): tokens are only appended; `expiry` is never raised and is lowered only to the
start of a segment that has not begun; turns, segments never decrease; `behaviour_logp` is NaN unless `sampled`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from streams.columns import Columns, Spec
from streams.regions import RegionBook, RegionLog

NEVER = np.iinfo(np.int32).max
"""The expiry of a token that stays visible for ever."""


class Kind(IntEnum):
    """What a token is. Generated text = THINK, DECISION, RESPONSE (sampled or forced), without END."""

    SYSTEM = 0
    SCAFFOLD = 1
    VIDEO = 2
    QUERY = 3
    THINK = 4
    DECISION = 5
    RESPONSE = 6
    END = 7
    MEMORY = 8


GENERATED_TEXT = (Kind.THINK, Kind.DECISION, Kind.RESPONSE)
GENERATED = (*GENERATED_TEXT, Kind.END)


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk of video as it was appended.

    frame_times: seconds on the video's clock. grid: merged (t, h, w) tokens of the whole chunk. keep: indices of the
    kept tokens in the full grid, None = all. feature: key of the clip whose features were embedded, with the weight
    version that encoded them (None when tower and mergers are frozen: every version encodes alike). patch_times: seconds
    from the start of the stream to each of the t temporal patches (the mean of its frames), for layouts that write time as
    text.
    """

    turn: int
    video: str
    frame_times: tuple[float, ...]
    grid: tuple[int, int, int]
    feature: str = ""
    feature_version: int | None = None
    keep: tuple[int, ...] | None = None
    patch_times: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w if self.keep is None else len(self.keep)


@dataclass(frozen=True)
class LogHeader:
    """What the log's numbers depend on. `score_temperature` is what every scorer divides the logits by."""

    stream_id: str
    task_id: str
    backbone: str
    policy: str
    policy_knobs: tuple[tuple[str, int | float | str], ...]
    position_convention: str
    banned: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    score_temperature: float = 1.0

    @property
    def trainable(self) -> bool:
        """Greedy streams are scored at temperature 1 but never trained: nothing was sampled at that temperature."""
        return self.temperature == self.score_temperature

    @property
    def memory(self) -> str:
        """The policy's name for people: one of the user's own by its class; with the positions, unless they are native."""
        knobs = dict(self.policy_knobs)
        name = str(knobs.get("target", self.policy))
        return f"{name} ({knobs['positions']})" if "positions" in knobs else name


@dataclass(frozen=True)
class StreamLog:
    """A finished log of L tokens.

    ids int32 [L]; kind, lane int8 [L]; turn, segment int32 [L]; positions int32 [3, L] (temporal, height, width);
    expiry int32 [L]; sampled, target bool [L]; behaviour_logp float64 [L]; version int32 [L].
    regions: of a stream with contiguous positions; `positions` are the native ones of every stream.
    """

    header: LogHeader
    ids: np.ndarray
    kind: np.ndarray
    turn: np.ndarray
    segment: np.ndarray
    lane: np.ndarray
    positions: np.ndarray
    expiry: np.ndarray
    sampled: np.ndarray
    target: np.ndarray
    behaviour_logp: np.ndarray
    version: np.ndarray
    chunks: tuple[ChunkRecord, ...]
    regions: RegionLog | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_turns(self) -> int:
        return int(self.turn[-1]) + 1 if len(self) else 0

    @property
    def versions(self) -> tuple[int, ...]:
        """Every weight version that made a token or encoded a chunk, ascending."""
        encoded = {c.feature_version for c in self.chunks if c.feature_version is not None}
        return tuple(sorted(encoded | {int(v) for v in np.unique(self.version)}))

    @property
    def oldest_version(self) -> int:
        return self.versions[0]

    @property
    def single_version(self) -> int | None:
        """The one weight version behind every token and chunk, or None if the stream lived through a swap."""
        return self.versions[0] if len(self.versions) == 1 else None

    @property
    def evicted_tokens(self) -> int:
        return int((self.expiry < len(self)).sum())

    @property
    def nbytes(self) -> int:
        arrays = (self.ids, self.kind, self.turn, self.segment, self.lane, self.positions, self.expiry)
        own = sum(a.nbytes for a in (*arrays, self.sampled, self.target, self.behaviour_logp, self.version))
        return own + (0 if self.regions is None else self.regions.nbytes)


_COLUMNS: Spec = {
    "ids": np.dtype(np.int32),
    "kind": np.dtype(np.int8),
    "turn": np.dtype(np.int32),
    "segment": np.dtype(np.int32),
    "lane": np.dtype(np.int8),
    "expiry": np.dtype(np.int32),
    "sampled": np.dtype(np.bool_),
    "target": np.dtype(np.bool_),
    "behaviour_logp": np.dtype(np.float64),
    "version": np.dtype(np.int32),
    "positions": np.dtype((np.int32, 3)),
}


BYTES_PER_TOKEN = sum(dtype.itemsize for dtype in _COLUMNS.values())
"""What one token costs in a StreamLog: its columns and three position ids."""


@dataclass(frozen=True)
class LogPiece:
    """Consecutive tokens of a log, handed out before its stream has ended; `streams.pieces` joins them.

    number: 0, 1, ...; first: log index of its first token. columns: as in StreamLog, by name. amended, amended_expiry [A]:
    tokens of earlier pieces whose expiry was lowered since. regions: of a contiguous stream, the moves and turns since the
    piece before. header: in piece 0 only. last: the stream ended with it.
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
    """Grows a StreamLog; or hands it out in pieces and holds only what came since, from log index `first` on.

    regions: of a stream with contiguous positions, what it has to say of them.
    """

    header: LogHeader
    regions: RegionBook | None = None
    length: int = 0
    first: int = 0
    segment_start: int = 0
    _columns: Columns = field(default_factory=lambda: Columns(_COLUMNS))
    _chunks: list[ChunkRecord] = field(default_factory=list)
    _segment: int = -1
    _turn: int = 0
    _pieces: int = 0
    _amended: list[tuple[np.ndarray, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Allocated for tokens, amendments, and what is to be said of regions."""
        regions = 0 if self.regions is None else self.regions.nbytes
        return self._columns.nbytes + sum(indices.nbytes for indices, _ in self._amended) + regions

    def column(self, name: str, start: int = 0) -> np.ndarray:
        """One column from log index `start` on, as a view to read; `start` must not have been handed out."""
        assert start >= self.first, f"tokens before {self.first} were handed out"
        return self._columns.column(name)[start - self.first :]

    def positions_between(self, start: int, stop: int) -> np.ndarray:
        """int32 [3, n]"""
        return self.column("positions", start)[: stop - start].T

    def begin_segment(self) -> int:
        """The next append starts a new segment; returns its first index."""
        self._segment += 1
        self.segment_start = self.length
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
        """Append tokens to the current segment; positions int [3, n]. Returns where they stand."""
        assert self._segment >= 0, "append before begin_segment"
        assert turn >= self._turn, "turns never decrease"
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
        early = indices < self.first
        if early.any():
            self._amended.append((indices[early], self.length))
        held = indices[~early] - self.first
        assert (self._columns.column("expiry")[held] >= self.length).all(), "expiry is never raised"
        self._columns.write("expiry", held, self.length)

    def cut(self, stop: int, *, last: bool = False) -> LogPiece:
        """Hand out what is held before log index `stop`, and forget it. last: the stream has ended."""
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
        """All of it, if nothing was handed out."""
        columns = _as_logged({name: self.column(name).copy() for name in _COLUMNS})
        regions = None if self.regions is None else self.regions.log()
        return StreamLog(header=self.header, chunks=tuple(self._chunks), regions=regions, **columns)


def _as_logged(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    return columns | {"positions": np.ascontiguousarray(columns["positions"].T)}

"""StreamLog: the record of what was done to one stream, token by token, in append order.

It is the only thing the learner trains from, and the one contract between rollout and learner.

Invariants (asserted by LogBuilder):
* tokens are only appended;
* `expiry` is never raised, and is lowered only to the start of a segment that has not begun;
* turns and segments never decrease;
* `behaviour_logp` is NaN unless `sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from streams.positions.regions import RegionLog

NEVER = np.iinfo(np.int32).max
"""The expiry of a token that is never evicted."""


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

    Attributes:
        turn: the turn that it was appended in.
        video: path of the video.
        frame_times: seconds on the video's clock.
        grid: merged (t, h, w) tokens of the whole chunk.
        feature: key of the clip whose features were embedded.
        feature_version: the weight version that encoded them; None if tower and mergers are frozen, so that every
            version encodes alike.
        keep: indices of the kept tokens in the full grid; None = all.
        patch_times: seconds from the start of the stream to each of the t temporal patches (the mean of its frames),
            for layouts that write time as text.
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
    """What the numbers of a log depend on. Every scorer divides the logits by `score_temperature`."""

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
        """False for greedy streams: they are scored at temperature 1, at which nothing was sampled."""
        return self.temperature == self.score_temperature

    @property
    def memory(self) -> str:
        """The policy's name for people: a user's policy by its class; with the positions unless they are native."""
        knobs = dict(self.policy_knobs)
        name = str(knobs.get("target", self.policy))
        return f"{name} ({knobs['positions']})" if "positions" in knobs else name


@dataclass(frozen=True)
class StreamLog:
    """A finished log of L tokens.

    Attributes:
        ids: int32 [L].
        kind, lane: int8 [L].
        turn, segment: int32 [L].
        positions: int32 [3, L] (temporal, height, width), the native ones in every stream.
        expiry: int32 [L], the first log index whose token can no longer attend to this one; NEVER if there is none.
        sampled, target: bool [L], whether a token was sampled, and whether it is trained on.
        behaviour_logp: float64 [L], the log-prob that it was sampled with, in nats.
        version: int32 [L], the weights that computed it.
        chunks: the video, chunk by chunk.
        regions: moves and offsets, for a stream with contiguous positions.
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
    def targets_by_turn(self) -> tuple[int, ...]:
        """How many target tokens each turn has; a log's targets in order are those of turn 0, of turn 1 and so on."""
        return tuple(np.bincount(self.turn[self.target], minlength=self.num_turns).tolist())

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


_COLUMNS: Mapping[str, np.dtype[Any]] = {
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
"""Bytes of one token in a StreamLog: its columns and three position ids."""

"""Every dataclass that crosses between actors: frozen, in one place. (What one actor alone is sent lives with it.)

Invariants: a message is a value (nobody changes it after sending); large arrays sit in payloads that
travel by object reference from the process that made them to the one that needs them, never through the driver.
`MESSAGES_VERSION` changes with any field; actors refuse a setup of another version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.log.mismatch import LogpDiff, OffToken
from streams.log.record import StreamLog
from streams.memory import MemoryConfig
from streams.task import Plan, Reason, StreamTask
from streams.turns import ParsedTurn

MESSAGES_VERSION = 8


@dataclass(frozen=True)
class RolloutTask:
    """One group to run: `streams` sampled copies watching one task as `plan` says.

    temperature 0 is greedy. features: object reference of the clip at the freeze boundary (see GroupPayload) if some
    worker has encoded it, else None.
    memory and empty_thoughts change the conditions of an evaluation; memory None means the worker's own.
    """

    group: str
    task: StreamTask
    plan: Plan
    streams: int
    temperature: float
    features: Any = None
    memory: MemoryConfig | None = None
    empty_thoughts: bool = False


@dataclass(frozen=True)
class ScriptedTurn:
    """A demonstrated turn in words: what to think, and what to say (None = stay silent)."""

    thought: str
    response: str | None


@dataclass(frozen=True)
class ScriptTask:
    """One demonstration to lay out as a log: the task and one scripted turn for every turn of the plan."""

    group: str
    task: StreamTask
    plan: Plan
    script: tuple[ScriptedTurn, ...]


@dataclass(frozen=True)
class RowTexts:
    """A row whose texts are to be judged by the tokenizer before anything is loaded.

    script: (turn, words) of its demonstration's turns that hold words; empty in RL and evaluation.
    """

    task: StreamTask
    script: tuple[tuple[int, ScriptedTurn], ...] = ()


@dataclass(frozen=True)
class RowWords:
    """What the tokenizer says about a row.

    refused: why the row cannot be laid out; None if it can. fits: index of every answer that is longer than a turn, and the
    beginning of it that a turn can hold.
    """

    refused: tuple[Reason, str] | None = None
    fits: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScriptedJob:
    """A row to be played by the scripted oracle and scored.

    fits: as in RowWords: of these answers the oracle says that much.
    """

    task: StreamTask
    plan: Plan
    fits: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupPayload:
    """The heavy half of a group, kept in the object store for the learner.

    media: uint8 frames [chunks, frames, h, w, 3] (`media_kind` "frames"), or float features [chunks, tokens, F]
    ("features"; F = Backbone.feature_width: the embedding of a video token and, behind it, every DeepStack level), or what
    the mergers make these of, [chunks, tokens, P] ("pre_merger"; P = Backbone.pre_merger_width), or an object reference
    to one of them. Shared by all logs of the group.
    """

    logs: tuple[StreamLog, ...]
    media_kind: str
    media: Any


@dataclass(frozen=True)
class GroupSummary:
    """The light half of a group, for driver and scorer. `failed` says why there is no payload; None if all went well.

    targets: tokens that the learner trains on, by stream and turn. oldest_version: of any token in the group. versions:
    weight versions seen by its tokens. tokens: sampled tokens.
    monitor: worker-side mismatch of the re-scored streams of this group; off: the token to look at. features: object
    reference to the clip at the freeze boundary or None, and its size.
    """

    group: str
    task_id: str
    worker: int
    turns: tuple[tuple[ParsedTurn, ...], ...] = ()
    targets: tuple[tuple[int, ...], ...] = ()
    oldest_version: int = 0
    versions: tuple[int, ...] = ()
    tokens: int = 0
    log_tokens: int = 0
    evicted_tokens: int = 0
    seconds: float = 0.0
    clip_seconds: float = 0.0
    monitor: LogpDiff = field(default_factory=LogpDiff)
    off: OffToken | None = None
    features: Any = None
    feature_bytes: int = 0
    failed: str | None = None


@dataclass(frozen=True)
class WeightsUpdate:
    """One published version: every trainable tensor in one flat uint8 buffer (a single transfer, not one per tensor)."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    buffer: np.ndarray


@dataclass(frozen=True)
class SwapReport:
    """A worker has swapped to `version`: seconds to fetch in the background, seconds the engine stood still.

    busy_share: share of the time since the swap before in which the engine had work.
    """

    worker: int
    version: int
    fetch_s: float
    pause_s: float
    busy_share: float


@dataclass(frozen=True)
class WorkerStats:
    """Counters since the worker's setup."""

    worker: int
    clips_encoded: int


@dataclass(frozen=True)
class TrainReport:
    """What one optimiser step did; `version` is the learner's version after it.

    age0: mismatch on the streams sampled wholly at the version before it; off: the token of them to look at.
    """

    step: int
    version: int
    metrics: dict[str, float]
    age0: LogpDiff = field(default_factory=LogpDiff)
    off: OffToken | None = None


@dataclass(frozen=True)
class ScoreReport:
    """Scores of groups under the learner's current weights: mismatch of behaviour log-probs, over all and by kind; off: the
    token to look at.
    """

    version: int
    diff: LogpDiff
    by_kind: dict[str, LogpDiff]
    off: OffToken | None = None


@dataclass(frozen=True)
class RewardJob:
    """Streams of one group to be scored: what each thought and said, and the plan that they ran by."""

    group: str
    task: StreamTask
    plan: Plan
    turns: tuple[tuple[ParsedTurn, ...], ...]

"""The messages that driver, workers, learner and scorer exchange: frozen dataclasses, in one place.

An actor's setup, and what only the learner's ranks are sent, is defined beside that actor (`rollout/setup.py`,
`learner/setup.py`, `learner/messages.py`).

Invariants:
* a message is a value: nobody changes it after sending it;
* large arrays are in payloads that travel by object reference from the process that made them to the one that needs
  them, never through the driver;
* `MESSAGES_VERSION` changes with any field, and actors refuse a setup of another version.
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

MESSAGES_VERSION = 15


@dataclass(frozen=True)
class RolloutTask:
    """One group to run: `streams` streams over one task, as `plan` says.

    Attributes:
        temperature: of sampling; 0 is greedy.
        features: object reference of the clip at the freeze boundary (see GroupPayload) if some worker has encoded it,
            else None.
        memory: the memory policy of an evaluation's condition; None is the worker's own.
        empty_thoughts: force an empty thought in every turn, another condition of an evaluation.
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
    """A row whose texts the tokenizer judges before anything is loaded.

    script: (turn, words) of the turns in which its demonstration thinks or says something; empty in RL and evaluation.
    """

    task: StreamTask
    script: tuple[tuple[int, ScriptedTurn], ...] = ()


@dataclass(frozen=True)
class RowWords:
    """What the tokenizer says about a row.

    Attributes:
        refused: why the row cannot be laid out; None if it can.
        fits: for every answer that is longer than a turn, its index and the beginning that a turn can hold.
    """

    refused: tuple[Reason, str] | None = None
    fits: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupPayload:
    """The heavy half of a group, kept in the object store for the learner.

    All logs of the group share one `media`: the clip at the freeze boundary, or an object reference to it. By
    `media_kind` it is

    * "frames": uint8 [chunks, frames, h, w, 3];
    * "pre_merger": the mergers' input, float [chunks, tokens, P] with P = Backbone.pre_merger_width;
    * "features": the mergers' output, float [chunks, tokens, F] with F = Backbone.feature_width: the embedding of a
      video token, followed by every DeepStack level.
    """

    logs: tuple[StreamLog, ...]
    media_kind: str
    media: Any


@dataclass(frozen=True)
class GroupSummary:
    """The light half of a group, for driver and scorer.

    Attributes:
        turns: parsed turns, by stream.
        targets: number of tokens that the learner trains on, by stream and turn.
        oldest_version: the oldest weight version behind any token of the group.
        versions: all weight versions behind its tokens, ascending.
        tokens: sampled tokens.
        log_tokens: all tokens of its logs.
        evicted_tokens: how many of those were evicted.
        preempted: times that a stream of the group was given back, as the KV pool was full, and began anew.
        seconds: wall time from the start of the group to its end.
        clip_seconds: length of the video that was shown.
        monitor: mismatch of those of its streams that the worker re-scored.
        off: the outlier: the token that shows a mismatch best.
        features: object reference to the clip at the freeze boundary, or None.
        feature_bytes: size of that clip.
        failed: why there is no payload; None if all went well.
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
    preempted: int = 0
    seconds: float = 0.0
    clip_seconds: float = 0.0
    monitor: LogpDiff = field(default_factory=LogpDiff)
    off: OffToken | None = None
    features: Any = None
    feature_bytes: int = 0
    failed: str | None = None


@dataclass(frozen=True)
class WeightsUpdate:
    """One published version: every trainable tensor in one flat uint8 buffer, which a worker fetches in one transfer.

    names, shapes: of the tensors, in the order of the buffer. dtype: of all of them, by torch's name.
    """

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    buffer: np.ndarray


@dataclass(frozen=True)
class SwapReport:
    """A worker has swapped to `version`.

    Attributes:
        fetch_s: seconds that fetching took, in the background.
        pause_s: seconds for which the engine paused.
        busy_share: share of the time since the previous swap in which the engine had work.
    """

    worker: int
    version: int
    fetch_s: float
    pause_s: float
    busy_share: float


@dataclass(frozen=True)
class WorkerStats:
    """What a worker says of itself.

    Attributes:
        clips_encoded: since its setup.
        visit_s: for how long its engine has been at work without waiting for more, in seconds; 0 while it waits.
    """

    worker: int
    clips_encoded: int
    visit_s: float = 0.0


@dataclass(frozen=True)
class TrainReport:
    """What one optimiser step did.

    Attributes:
        version: the learner's version after the step.
        age0: mismatch on the streams that were sampled entirely at the version before the step.
        off: the outlier among their tokens.
    """

    step: int
    version: int
    metrics: dict[str, float]
    age0: LogpDiff = field(default_factory=LogpDiff)
    off: OffToken | None = None


@dataclass(frozen=True)
class ScoreReport:
    """What re-scoring groups under the learner's weights of `version` found.

    Attributes:
        diff: mismatch with the behaviour log-probs, over all sampled tokens.
        by_kind: the same by kind of token.
        off: the outlier among them.
    """

    version: int
    diff: LogpDiff
    by_kind: dict[str, LogpDiff]
    off: OffToken | None = None


@dataclass(frozen=True)
class RewardJob:
    """Streams of one group to score: what each thought and said, and the plan that they ran by."""

    group: str
    task: StreamTask
    plan: Plan
    turns: tuple[tuple[ParsedTurn, ...], ...]

"""The rows of `benchmarks.consistency`: which policies, what is measured of each, and which bars it must reach.

Invariants: an empty sample is None, never 0, and misses its bar; so does NaN. A stream counts once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from rollout.engine.request import StreamRequest, stream_bound
from streams.backbone.backbone import Backbone
from streams.log.mismatch import LogpDiff
from streams.log.record import Kind, StreamLog
from streams.memory import CONTIGUOUS, MemoryConfig
from tests.support.exactness.defects import DEFECTS, NOT_APPLICABLE, planted
from tests.support.exactness.streams import random_requests, run, signed_differences


@dataclass(frozen=True)
class Policy:
    """A row's policy and its name in the report. The largest chunk has 8 tokens."""

    name: str
    memory: MemoryConfig

    @property
    def positions(self) -> str:
        return self.memory.positions


POLICIES = (
    Policy("full", MemoryConfig("full")),
    Policy("rcsm", MemoryConfig("rcsm", 3)),
    Policy("rcsm_text", MemoryConfig("rcsm", 3, text_window=5)),
    Policy("recent_frames", MemoryConfig("recent_frames", 3)),
    Policy("sink_window", MemoryConfig("sink_window", 3, text_window=5, sink_tokens=6, tail_tokens=8)),
    Policy("text_memory", MemoryConfig("text_memory")),
    Policy(
        "sink_window",
        MemoryConfig("sink_window", 3, text_window=5, sink_tokens=6, tail_tokens=8, positions="contiguous"),
    ),
    Policy("visual_budget", MemoryConfig("visual_budget", video_tokens=12)),
    Policy("random", MemoryConfig("random", seed=1, rate=0.2)),
)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

BARS: dict[str, dict[str, float]] = {
    "fp64": {"max": 1e-10},
    "fp32": {"max": 3e-4, "mean": 1e-5},
    "bf16": {"mean": 1e-2, "k3": 1e-4},
}
"""dtype -> figure -> the largest that passes."""
DEFECT_BAR = 1e-7
"""In fp64, every planted defect that applies must be larger: a thousandfold the bar of what is right."""
VIDEO_EVICTED_BAR = 0.3


@dataclass(frozen=True)
class Size:
    """How much of a row is run.

    tokens: sampled ones, at least. low, high: a stream has `low` to `high` - 1 turns. streams: how many run at once.
    defect_streams: the defects are planted in so many of the first streams.
    """

    tokens: int
    streams: int
    low: int
    high: int
    defect_streams: int


FULL = Size(tokens=10_000, streams=28, low=24, high=33, defect_streams=3)
QUICK = Size(tokens=300, streams=5, low=9, high=13, defect_streams=2)


@dataclass(frozen=True)
class Measured:
    """What was measured of one row.

    mean, p99, max, k3: of |behaviour - re-scored| log-prob (k3 estimates the KL divergence).

    evicted: evicted tokens of any kind. video_evicted: evicted share of the video tokens. by_kind: p99 and max by kind of
    token.
    """

    policy: str
    backbone: str
    positions: str
    dtype: str
    tokens: int
    evicted: int
    mean: float | None
    p99: float | None
    max: float | None
    defects: dict[str, float | None]
    k3: float | None
    video_evicted: float | None
    by_kind: dict[str, dict[str, float]]

    def named(self) -> dict[str, Any]:
        """Return the row by the keys of the report."""
        beside = ("k3", "video_evicted", "by_kind")
        return {key: value for key, value in asdict(self).items() if key not in beside}

    def misses(self, size: Size, evicts: bool) -> list[str]:
        """Return, in words, what misses its bar. Every comparison is written so that NaN and None fail."""
        wrong = []
        for figure, bar in BARS[self.dtype].items():
            value = getattr(self, figure)
            if value is None or not value <= bar:
                wrong.append(f"{figure} {value} is not within {bar:g}")
        if not self.tokens >= size.tokens:
            wrong.append(f"{self.tokens} sampled tokens are fewer than {size.tokens}")
        if evicts and (self.video_evicted is None or not self.video_evicted >= VIDEO_EVICTED_BAR):
            wrong.append(f"share of video tokens evicted {self.video_evicted} is below {VIDEO_EVICTED_BAR}")
        if evicts != (self.evicted > 0):
            wrong.append(f"{self.evicted} tokens evicted")
        if self.dtype == "fp64":
            skipped = NOT_APPLICABLE.get(self.policy, {})
            for name in DEFECTS:
                value = self.defects.get(name)
                if value is None and name not in skipped:
                    wrong.append(f"the defect {name} was not planted")
                elif value is not None and not value > DEFECT_BAR:
                    wrong.append(f"the planted defect {name} shows as {value}, not above {DEFECT_BAR:g}")
        return wrong


def measure(backbone: Backbone, policy: Policy, dtype: str, size: Size, attention: str) -> Measured:
    """Run streams until enough tokens are sampled, score them again, then plant the defects in the first ones."""
    logs: list[StreamLog] = []
    requests: list[StreamRequest] = []
    signed: list[np.ndarray] = []
    while sum(map(len, signed)) < size.tokens:
        batch = random_requests(backbone, policy.memory, size.streams, seed=len(requests), low=size.low, high=size.high)
        slots = sum(stream_bound(r) for r in batch)
        done = run(backbone, batch, max_streams=len(batch), kv_slots=slots)
        scored = signed_differences(backbone, done, batch, attention)
        if not len(scored):
            break
        signed.append(scored)
        logs, requests = logs + done, requests + batch
    found = np.concatenate(signed) if signed else np.zeros(0)
    check_counted_once(logs, found)
    check_positions(logs, policy.positions)
    some = slice(0, size.defect_streams)
    return Measured(
        policy=policy.name,
        backbone=backbone.name,
        positions=policy.positions,
        dtype=dtype,
        defects=planted(backbone, policy.memory, requests[some], logs[some]) if logs else {},
        **figures(logs, found),
    )


def check_counted_once(logs: list[StreamLog], found: np.ndarray) -> None:
    """Raise ValueError if a stream, or a token of it, was counted twice or not at all."""
    sampled = sum(int(log.sampled.sum()) for log in logs)
    if len(found) != sampled:
        raise ValueError(f"{len(found)} differences for {sampled} sampled tokens")
    distinct = {(log.ids.tobytes(), log.behaviour_logp.tobytes()) for log in logs}
    if len(distinct) != len(logs):
        raise ValueError(f"{len(logs)} streams, of which only {len(distinct)} differ: a stream was counted twice")


def check_positions(logs: list[StreamLog], positions: str) -> None:
    """Raise ValueError if the streams did not have the positions that their row is named after."""
    for log in logs:
        moved = log.regions is not None and len(log.regions.token) > 0
        if moved != (positions == CONTIGUOUS):
            raise ValueError(
                f"stream {log.header.stream_id} moved {'some' if moved else 'no'} token in a row of {positions} positions"
            )


def figures(logs: list[StreamLog], found: np.ndarray) -> dict[str, Any]:
    """Return the figures of these logs' differences; None where there was nothing to measure."""
    stats, sizes = LogpDiff.of(found), np.abs(found)
    none = np.zeros(0)
    kinds = np.concatenate([log.kind[log.sampled] for log in logs]) if logs else none
    video = np.concatenate([log.expiry[log.kind == Kind.VIDEO] < len(log) for log in logs]) if logs else none
    return {
        "tokens": stats.tokens,
        "evicted": sum(log.evicted_tokens for log in logs),
        "mean": stats.mean,
        "p99": float(np.percentile(sizes, 99)) if len(sizes) else None,
        "max": stats.max,
        "k3": stats.k3,
        "video_evicted": float(video.mean()) if len(video) else None,
        "by_kind": {
            Kind(int(kind)).name.lower(): {
                "tokens": int((kinds == kind).sum()),
                "p99": float(np.percentile(sizes[kinds == kind], 99)),
                "max": float(np.max(sizes[kinds == kind])),
            }
            for kind in np.unique(kinds)
        },
    }

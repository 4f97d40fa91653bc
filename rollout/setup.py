"""What a rollout worker is made from, and what it tells about itself once it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streams.backbone.boundary import Boundary
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import MESSAGES_VERSION
from streams.video.config import VideoConfig


@dataclass(frozen=True)
class WorkerSetup:
    """What a rollout worker needs before its first group.

    kv_slots: tokens of its KV pool. staging: where fetched weights wait, `device` or `host`. monitor_every: re-score every
    N-th stream of one version; off_above: the difference from which on a token of it is named; scoring_attention: what the
    learner is asked to score with.
    """

    checkpoint: str
    dtype: str
    layout: LayoutConfig
    memory: MemoryConfig
    video: VideoConfig
    boundary: Boundary
    max_streams: int
    kv_slots: int
    monitor_every: int
    run_seed: int
    version: int = 0
    off_above: float = math.inf
    scoring_attention: str = "auto"
    staging: str = "device"
    attention: str = "auto"
    vision_attention: str = "auto"
    messages_version: int = MESSAGES_VERSION


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker answers to its setup. attention: the engine's attention backend, and why that one."""

    worker: int
    node: str
    pid: int
    kv_slots: int
    parameters: int
    attention: str

"""What a rollout worker is set up with for a stage, and what it reports once it is loaded.

Invariants:
* values are those of the run's configs, which have validated them; nothing is re-listed here that a config can carry;
* importing it loads neither torch nor ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rollout.config import RolloutConfig
from streams.backbone.boundary import Boundary
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import MESSAGES_VERSION
from streams.video.config import VideoConfig


@dataclass(frozen=True)
class SelfCheckSetup:
    """How a worker compares its engine with the learner's scoring, on its own weights.

    Attributes:
        every: re-score every N-th finished stream of one weight version; 0 for none.
        outlier_above: a token whose log-probs differ by more than this, in nats, is reported by name.
        attention: the kernel that the learner is asked to score with.
    """

    every: int
    outlier_above: float = math.inf
    attention: str = "auto"


@dataclass(frozen=True)
class WorkerSetup:
    """What a rollout worker needs before its first group.

    Attributes:
        checkpoint: folder to load.
        dtype: of the weights on the worker.
        layout, memory, video, rollout: the run's settings. A task may override the memory.
        boundary: the freeze boundary of the stage's learner.
        kv_slots: tokens that the KV pool has room for.
        run_seed: what the streams' seeds are derived from.
        self_check: how the engine is compared with the learner's scoring.
        version: of the checkpoint's weights.
        staging: where fetched weights wait for the swap, `device` or `host`.
        vision_attention: the kernel of the vision tower. fused_kernels: of the text model.
        messages_version: of the driver; a worker of another version refuses the setup.
    """

    checkpoint: str
    dtype: str
    layout: LayoutConfig
    memory: MemoryConfig
    video: VideoConfig
    rollout: RolloutConfig
    boundary: Boundary
    kv_slots: int
    run_seed: int
    self_check: SelfCheckSetup
    version: int = 0
    staging: str = "device"
    vision_attention: str = "auto"
    fused_kernels: str = "auto"
    messages_version: int = MESSAGES_VERSION


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker answers to its setup.

    attention: the engine's attention backend, and why that one. oom_kills: processes that its node ended for lack of memory.
    """

    worker: int
    node: str
    pid: int
    kv_slots: int
    parameters: int
    attention: str
    oom_kills: int = 0

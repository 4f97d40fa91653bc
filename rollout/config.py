"""Typed settings of the rollout workers (Hydra key `rollout`).

Sampling that the learner cannot score exactly is refused here, before any actor starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streams.backbone.kernel_choice import CUDA_GRAPHS, ROLLOUT_ATTENTION

PREFILL_ROWS = 2048
"""Tokens of one prefill forward, about: fewer leave the cores of a GPU waiting, more fall out of a CPU's caches."""
SELF_CHECK_HEAD = 256
"""Tokens whose logits exist at once when a worker re-scores a stream: the memory is missing in its KV pool."""


@dataclass(frozen=True)
class RolloutConfig:
    """The rollout workers and their engines."""

    workers: int = 2
    """Rollout actors, each with one engine: as many as are wanted."""
    min_workers: int = 1
    """Fewest of them that a run begins and goes on with. The others join when nodes have room for them. With
    `deterministic` all are needed.
    """
    max_streams: int = 64
    """Streams that one engine runs at once."""
    decode_steps: int = 8
    """Tokens that a stream decodes at most between two visits of the host, which begins turns and writes logs. More leave
    the device alone for longer; a stream whose turn ends waits for the visit, and new weights wait for it, too.
    """
    kv_memory_mb: int = 0
    """MiB of an engine's KV pool; 0 = what `rollout.max_streams` of the longest streams can fill, or what the
    device has left. A smaller pool runs fewer streams at once; with FlashInfer some may begin anew.
    """
    temperature: float = 1.0
    """Sampling temperature, above 0; the learner scores with the same."""
    top_k: int = 0
    """Tokens that sampling is limited to. Must be 0 (no limit): the learner cannot score truncated sampling yet."""
    top_p: float = 1.0
    """Probability mass that sampling is limited to. Must be 1 (no limit), as for `rollout.top_k`."""
    group_deadline_s: float = 120.0
    """Seconds from a group's first step; a group that takes longer is dropped and counted."""
    threads: int = 1
    """Torch CPU threads of a worker."""
    attention: str = "auto"
    """Attention kernel of the engine: `flashinfer`, `torch`, `triton`, or `auto`. With `auto`, turns begin with flashinfer
    where it runs (CUDA, half precision, installed), else with torch; on CUDA they decode with triton, which can be a CUDA
    graph. `triton` is the same, but refuses a machine where it cannot decode.
    """
    cuda_graphs: str = "auto"
    """Replay decode steps as CUDA graphs: `auto` = on CUDA, where triton decodes; `off` launches kernel by kernel."""

    def __post_init__(self) -> None:
        for key in ("workers", "max_streams", "decode_steps", "threads"):
            if getattr(self, key) < 1:
                raise ValueError(f"rollout.{key}={getattr(self, key)} must be at least 1")
        if not 1 <= self.min_workers <= self.workers:
            raise ValueError(f"rollout.min_workers={self.min_workers} must lie in 1..{self.workers} (rollout.workers)")
        if self.kv_memory_mb < 0:
            raise ValueError(f"rollout.kv_memory_mb={self.kv_memory_mb} must be a number of MiB, 0 for what is left")
        if self.attention not in ROLLOUT_ATTENTION:
            raise ValueError(f"rollout.attention={self.attention!r} is not one of {', '.join(ROLLOUT_ATTENTION)}")
        if self.cuda_graphs not in CUDA_GRAPHS:
            raise ValueError(f"rollout.cuda_graphs={self.cuda_graphs!r} is not one of {', '.join(CUDA_GRAPHS)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"rollout.temperature={self.temperature} must be a positive number: greedy streams cannot be trained on"
            )
        if self.top_k != 0 or self.top_p != 1.0:
            raise ValueError(
                f"rollout.top_k={self.top_k}, rollout.top_p={self.top_p}: truncated sampling needs the allowed ids of "
                "every step in the log, which is not built yet; set top_k=0 and top_p=1.0"
            )
        if not 0 < self.group_deadline_s < math.inf:
            raise ValueError(f"rollout.group_deadline_s={self.group_deadline_s} must be a positive number of seconds")

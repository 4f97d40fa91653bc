"""Bytes of a clip at the freeze boundary, compared with the budget of the caches before any model is loaded.

Pure arithmetic on a checkpoint's geometry. The driver keeps references to what rollouts ship, and every worker the
clips that it encoded, each up to `data.cache_mb`. A chunk's tokens are bounded by `data.video.max_pixels`; only a frame
of extreme aspect ratio, one token high, can be rounded up to more.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import RunConfig
from runtime.planning.footprint import BYTES, gib
from streams.backbone.boundary import Boundary
from streams.checkpoint.model_shape import ModelGeometry
from streams.video.config import VideoConfig


@dataclass(frozen=True)
class ChunkSize:
    """One chunk at the boundary: `rows` tokens (frames: pixels) of `width` values, of `item` bytes each."""

    kind: str
    rows: int
    width: int
    item: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.item

    def __str__(self) -> str:
        return f"{self.rows:,} {'pixels' if self.kind == 'frames' else 'tokens'} x {self.width} x {self.item} bytes"


def chunk_size(geometry: ModelGeometry, kind: str, dtype: str, video: VideoConfig) -> ChunkSize:
    """Return the size of the largest chunk of media of `kind` (see GroupPayload) with that model."""
    tokens = max(1, video.max_pixels // geometry.token_side**2)
    if kind == "frames":
        return ChunkSize(kind, video.frames_per_chunk * tokens * geometry.token_side**2, 3, 1)
    width = geometry.pre_merger_width if kind == "pre_merger" else geometry.feature_width
    return ChunkSize(kind, video.frames_per_chunk // geometry.temporal_patch_size * tokens, width, BYTES[dtype])


def check_features(config: RunConfig, geometry: ModelGeometry, stage: str, turns: int) -> str:
    """Return a line with the arithmetic. turns: of the longest task.

    Raises ValueError if features of the longest clip exceed the budget: the tower would encode it anew for every group.
    Frames may exceed it, since they are only read again.
    """
    if stage == "sft" and "rl" in config.job.stages:
        # Find out before the cold start, not after it, what RL cannot keep.
        check_features(config, geometry, "rl", turns)
    # Demonstrations travel as frames, whatever trains.
    kind = (Boundary.NONE if stage == "sft" else config.learner.boundary).ships
    chunk = chunk_size(geometry, kind, config.model.dtype, config.data.video)
    clip, budget = chunk.nbytes * turns, config.data.cache_mb * 2**20
    where = "" if kind == "frames" else f" (learner.freeze={config.learner.freeze})"
    words = (
        f"clips of {stage} travel as {kind}{where}: a chunk of at most {chunk} = {gib(chunk.nbytes)}, the longest clip "
        f"({turns} turns) {gib(clip)}; data.cache_mb={config.data.cache_mb} holds {budget // clip} such clips"
    )
    if kind == "frames":
        return f"{words} on each worker"
    if clip > budget:
        raise ValueError(
            f"{words}, so each would be encoded anew for every group: set data.cache_mb to {-(-clip // 2**20)} or more, or "
            "make clips smaller (data.video.max_pixels, data.max_turns)"
        )
    return f"{words} on each worker, and as many references in the driver"

"""What a clip weighs at the freeze boundary, compared with the byte budget of the caches before any model is loaded.

Owner: rl. Pure arithmetic on a checkpoint's config.json; no torch. The driver keeps references to what rollouts ship, every
worker the clips that it encoded, each up to `data.cache_mb`. A chunk's tokens are bounded by `data.video.max_pixels`;
only a frame of extreme aspect ratio, one token high, can be rounded to more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from rl.disk import BYTES, gib
from streams.freezing import MEDIA_KINDS
from streams.video import VideoConfig


@dataclass(frozen=True)
class ChunkSize:
    """One chunk at the boundary: so many rows of so many numbers (frames: pixels of three) of so many bytes each."""

    kind: str
    rows: int
    width: int
    item: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.item

    def __str__(self) -> str:
        return f"{self.rows:,} {'pixels' if self.kind == 'frames' else 'tokens'} x {self.width} x {self.item} bytes"


def chunk_size(model: dict[str, Any], kind: str, dtype: str, video: VideoConfig) -> ChunkSize:
    """The largest chunk of media of `kind` (see GroupPayload) under the model of a config.json."""
    vision, text = model["vision_config"], model.get("text_config") or model
    qwen3 = model["model_type"] == "qwen3_vl"
    # What a config leaves out has the value of the family's published checkpoints.
    merge = int(vision.get("spatial_merge_size", 2))
    side = merge * int(vision.get("patch_size", 16 if qwen3 else 14))
    if kind == "frames":
        return ChunkSize(kind, video.frames_per_chunk * max(1, video.max_pixels // side**2) * side**2, 3, 1)
    levels = len(vision.get("deepstack_visual_indexes", (8, 16, 24))) if qwen3 else 0
    row = merge**2 * int(vision["hidden_size"]) if kind == "pre_merger" else int(text["hidden_size"])
    patches = video.frames_per_chunk // int(vision.get("temporal_patch_size", 2))
    return ChunkSize(kind, patches * max(1, video.max_pixels // side**2), row * (1 + levels), BYTES[dtype])


def check_features(config: RunConfig, checkpoint: Path, stage: str, turns: int) -> str:
    """A line with the arithmetic, `turns` being the longest task's; ValueError with it if the budget holds no such clip.

    Frames that are not kept are read again; features that are not kept cost the tower again, for every group.
    """
    if stage == "sft" and "rl" in config.job.stages:
        # What RL cannot keep must not be found out only after the cold start.
        check_features(config, checkpoint, "rl", turns)
    # Demonstrations travel as frames, whatever trains.
    kind = "frames" if stage == "sft" else MEDIA_KINDS[config.learner.freeze]
    model = json.loads((checkpoint / "config.json").read_text())
    chunk = chunk_size(model, kind, config.model.dtype, config.data.video)
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

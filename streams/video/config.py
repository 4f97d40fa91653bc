"""What a chunk is: its length, its frames, their pixel budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from streams.checkpoint.families import TEMPORAL_PATCH


class Spanned(Protocol):
    """What has a length: a task, or a file that is watched."""

    @property
    def video(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


@dataclass(frozen=True)
class VideoConfig:
    """Hydra key `data.video`. min_pixels, max_pixels: budget of one frame after resizing.

    max_chunks: 0 (the default) = every chunk lasts `chunk_seconds`, whatever follows. Otherwise the chunk length of a
    task is ceil(its length / max_chunks) seconds, at least `chunk_seconds`, as ThinkStream does it. That is **not
    causal**: at the first chunk it takes knowing how long the video will be, which no live stream knows.
    """

    chunk_seconds: float = 1.0
    max_chunks: int = 0
    frames_per_chunk: int = 2
    min_pixels: int = 28 * 28
    max_pixels: int = 56 * 56
    decode_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("chunk_seconds", "decode_timeout_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"data.video.{name}={value} must be a positive number of seconds")
        if self.max_chunks < 0:
            raise ValueError(
                f"data.video.max_chunks={self.max_chunks} must not be negative (0 = constant chunk length)"
            )
        if self.frames_per_chunk < 1 or self.frames_per_chunk % TEMPORAL_PATCH:
            raise ValueError(
                f"data.video.frames_per_chunk={self.frames_per_chunk} must be a positive multiple of "
                f"{TEMPORAL_PATCH}: the vision tower joins {TEMPORAL_PATCH} frames into one patch"
            )
        if self.min_pixels < 1:
            raise ValueError(f"data.video.min_pixels={self.min_pixels} must be at least 1")
        if self.max_pixels < self.min_pixels:
            raise ValueError(
                f"data.video.max_pixels={self.max_pixels} must not be smaller than "
                f"data.video.min_pixels={self.min_pixels}"
            )

    def chunk_seconds_of(self, task: Spanned) -> float:
        """Length of one chunk of this task, in seconds: the only place that decides it."""
        if not self.max_chunks:
            return self.chunk_seconds
        if not math.isfinite(task.end):
            raise ValueError(
                f"{task.video}: data.video.max_chunks={self.max_chunks} makes the chunk length depend on the video's "
                "length, which the row does not say: load the file with `load_tasks(..., video=...)`, or give it"
            )
        return max(self.chunk_seconds, float(math.ceil((task.end - task.start) / self.max_chunks)))

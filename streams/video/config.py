"""What a chunk is: its length, its frames, their pixel budget.

Invariant: `VideoConfig.chunk_seconds_of` alone decides how long the chunks of a task are.
"""

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
    """What a chunk is: its length, its frames, their pixels."""

    chunk_seconds: float = 1.0
    """Length of a chunk in seconds; with `data.video.max_chunks`, the shortest one."""
    max_chunks: int = 0
    """0 = every chunk lasts `data.video.chunk_seconds`. Otherwise the chunks of a task last ceil(its length /
    max_chunks) seconds, as in ThinkStream. That is not causal: a live stream does not know how long it will be.
    """
    frames_per_chunk: int = 2
    """Frames of a chunk, a multiple of 2: the vision tower joins two frames into one patch."""
    min_pixels: int = 28 * 28
    """Fewest pixels of a frame after resizing."""
    max_pixels: int = 56 * 56
    """Most pixels of a frame after resizing."""
    decode_timeout_s: float = 20.0
    """Seconds that reading a clip may take; a file that needs longer is skipped by name."""

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
        """Return the length of one chunk of this task, in seconds.

        Raises ValueError if it depends on the task's end and that is unknown.
        """
        if not self.max_chunks:
            return self.chunk_seconds
        if not math.isfinite(task.end):
            raise ValueError(
                f"{task.video}: data.video.max_chunks={self.max_chunks} makes the chunk length depend on the video's "
                "length, which the row does not say: load the file with `load_tasks(..., video=...)`, or give it"
            )
        return max(self.chunk_seconds, float(math.ceil((task.end - task.start) / self.max_chunks)))

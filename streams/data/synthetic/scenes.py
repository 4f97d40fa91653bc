"""Drawing and writing of the synthetic clips: one coloured shape on grey, as small H.264 files.

Invariants:
* the same scene and seed give the same frames;
* a shape is shown from the first frame of its first chunk to the last frame of its last chunk;
* at most one shape is visible at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import VideoStream

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 175, 60),
    "blue": (45, 65, 220),
    "yellow": (235, 215, 40),
}
SHAPES = ("square", "circle", "triangle")
BACKGROUND_LEVEL = 128
LEVEL_JITTER = 10
TEXTURE = 4


@dataclass(frozen=True)
class Shown:
    """A shape that is visible in the chunks [first, stop).

    side: the shape's side; row, column: distance of its centre from the frame's centre. All three are fractions of the
    frame's short side.
    """

    first: int
    stop: int
    colour: str
    shape: str
    side: float
    row: float
    column: float


@dataclass(frozen=True)
class Scene:
    """A whole clip. height and width must be even; every chunk holds frames_per_chunk frames."""

    chunks: int
    chunk_seconds: float
    frames_per_chunk: int
    height: int
    width: int
    shown: tuple[Shown, ...]

    def visible(self, chunk: int) -> Shown | None:
        return next((shape for shape in self.shown if shape.first <= chunk < shape.stop), None)

    @property
    def rate(self) -> Fraction:
        """Frames per second; a whole number of frames per chunk keeps changes on chunk boundaries."""
        return self.frames_per_chunk / Fraction(self.chunk_seconds).limit_denominator(1000)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the scene's frames: uint8 [chunks * frames_per_chunk, height, width, 3]."""
    level = BACKGROUND_LEVEL + rng.integers(-LEVEL_JITTER, LEVEL_JITTER + 1)
    texture = rng.integers(-TEXTURE, TEXTURE + 1, size=(scene.height, scene.width, 1))
    empty = np.broadcast_to(level + texture, (scene.height, scene.width, 3)).astype(np.uint8)
    pictures = []
    for chunk in range(scene.chunks):
        picture = empty.copy()
        shape = scene.visible(chunk)
        if shape is not None:
            picture[_mask(shape, scene.height, scene.width)] = COLOURS[shape.colour]
        pictures.append(picture)
    return np.repeat(np.stack(pictures), scene.frames_per_chunk, axis=0)


def _mask(shape: Shown, height: int, width: int) -> np.ndarray:
    short = min(height, width)
    rows, columns = np.mgrid[:height, :width]
    # Distances from the shape's centre, in units of half its side: the square is [-1, 1] x [-1, 1].
    half = shape.side * short / 2
    down = (rows - (height - 1) / 2 - shape.row * short) / half
    right = (columns - (width - 1) / 2 - shape.column * short) / half
    inside = (np.abs(down) <= 1) & (np.abs(right) <= 1)
    if shape.shape == "circle":
        return down**2 + right**2 <= 1
    if shape.shape == "triangle":
        return inside & (np.abs(right) <= (down + 1) / 2)
    return inside


def write_clip(
    path: str | Path, frames: np.ndarray, fps: int | float | Fraction, options: dict[str, str] | None = None
) -> None:
    """Write uint8 [n, h, w, 3] frames as H.264 (4:2:0, so sides must be even). options: the container's.

    Raises ValueError for frames of another shape or type.
    """
    import av

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames of shape {list(frames.shape)}, type {frames.dtype} must be uint8 [n, h, w, 3]")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width}x{height} pixels: H.264 with 4:2:0 colour needs even sides")
    with av.open(str(path), "w", options=options or {}) as container:
        stream: VideoStream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18"}
        # Threads would split a frame, and the bytes would depend on the machine.
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(frames):
            # Most frames equal the one before: only those that change are converted.
            if i == 0 or not np.array_equal(frame, frames[i - 1]):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = picture.reformat(format="yuv420p")
            picture.pts = None
            container.mux(stream.encode(picture))
        container.mux(stream.encode())

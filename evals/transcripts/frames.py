"""Small frames of the chosen streams, as data URIs under a byte budget.

Videos are read again here, at thumbnail size.

Invariants:
* a video that cannot be read leaves its own strip without frames, and no other;
* a strip's note names what it lacks;
* a strip is never larger than its share.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from streams.video.config import VideoConfig
from streams.video.reader import Clip, ClipReader, VideoError

THUMB_PIXELS = 160 * 120
JPEG_QUALITY = 78


@dataclass(frozen=True)
class Strip:
    """The frames of one stream, as data URIs by turn. note: what is missing or smaller; '' if nothing is."""

    frames: dict[int, tuple[str, ...]]
    note: str = ""

    @property
    def nbytes(self) -> int:
        return sum(len(uri) for uris in self.frames.values() for uri in uris)


def read_strips(streams: Mapping[str, Mapping[str, Any]], video: VideoConfig, budget: int) -> dict[str, Strip]:
    """Return the strips by task, for records of format 1 by task. budget: bytes of all strips together.

    Short streams are served first; what they leave of their equal share goes to the longer ones.
    """
    small = replace(video, max_pixels=min(video.max_pixels, THUMB_PIXELS), min_pixels=min(video.min_pixels, 1024))
    strips: dict[str, Strip] = {}
    left = budget
    # Sides become even, not multiples of the model's patches: a thumbnail keeps the video's shape.
    with ClipReader(small, patch_size=1, merge_size=2) as reader:
        for done, task in enumerate(sorted(streams, key=lambda task: (len(streams[task]["turns"]), task))):
            strip = _read(reader, streams[task], left // (len(streams) - done))
            left -= strip.nbytes
            strips[task] = strip
    return strips


def _read(reader: ClipReader, stream: Mapping[str, Any], share: int) -> Strip:
    try:
        end = math.inf if stream["end"] is None else stream["end"]
        seconds = stream.get("chunk_seconds")
        clip = reader.read(stream["video"], stream["start"], end, len(stream["turns"]), chunk_seconds=seconds)
    except (VideoError, ValueError, RuntimeError) as error:
        return Strip({}, f"no frames: {error.reason if isinstance(error, VideoError) else error}")
    strip = Strip({}, "no frames: they do not fit into eval.transcript_mb")
    for strip in _ladder(clip):
        if strip.nbytes <= share:
            return strip
    return Strip({}, "no frames: they do not fit into eval.transcript_mb")


def _ladder(clip: Clip) -> Iterator[Strip]:
    """Yield the clip's frames, ever smaller: all, one a chunk, half the size, every second chunk, fourth, ..."""
    turns, per_chunk = clip.frames.shape[:2]
    yield _strip(clip, 1, 1, per_chunk, "")
    yield _strip(clip, 1, 1, 1, f"1 of {per_chunk} frames a chunk")
    every = 1
    while every <= turns:
        thinned = "" if every == 1 else f", every {every}th chunk"
        yield _strip(clip, every, 2, 1, f"1 of {per_chunk} frames a chunk, half size{thinned}")
        every *= 2


def _strip(clip: Clip, every: int, shrink: int, per_chunk: int, note: str) -> Strip:
    chosen = range(0, len(clip.frames), every)
    return Strip({i: tuple(_uri(frame, shrink) for frame in clip.frames[i][:per_chunk]) for i in chosen}, note)


def _uri(frame: np.ndarray, shrink: int) -> str:
    image = Image.fromarray(np.ascontiguousarray(frame))
    if shrink > 1:
        image = image.resize((max(1, image.width // shrink), max(1, image.height // shrink)))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()

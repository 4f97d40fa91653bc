"""The decode process: reads clips with PyAV, one request at a time, until its pipe closes.

`streams.video.reader.ClipReader` starts it as `python -m streams.video.decode <fd>`. Native decoding can block for ever
while it holds the interpreter, so only a process of its own can be given a deadline.

Invariants:
* a frame is never later than the time it was asked for (to 1 ms), by the presentation time that it was decoded with;
* files are only ever read forwards from their beginning;
* the process ends when its parent does (end of file on the pipe, or the alarm while it is stuck in native code);
* its imports stay light: every reader starts one.
"""

from __future__ import annotations

import math
import os
import signal
import struct
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from streams.video.confined import SeenFiles, kind_refused, outside
from streams.video.presentation import DISORDER, REMUX, DecodeError, Presentation, Survey, opened, presentation, refused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from av.video.frame import VideoFrame

MAX_ASPECT_RATIO = 200
TIME_TOLERANCE_S = 1e-3
"""MKV, WebM and FLV round times to milliseconds: a frame at 2/3 s is at 0.667 s in the file, and belongs to 2/3 s."""
ORPHAN_GRACE_S = 5
READY = "ready"


@dataclass(frozen=True)
class DurationRequest:
    """Ask what a player shows of a video, its length among it. deadline_s: how long the parent will wait."""

    kind: ClassVar[str] = "duration"
    video: str
    deadline_s: float


@dataclass(frozen=True)
class ClipRequest:
    """What to read. factor: frame sides become multiples of it. deadline_s: how long the parent will wait.

    end: infinite = as far as the video goes: fewer chunks than num_chunks then come back, if need be only min_chunks.
    root: the resolved folder that the file must be in; '' = it is not a row's, and may be any file.
    size: bytes that a row's file must have; None = any number.
    """

    kind: ClassVar[str] = "clip"
    video: str
    start: float
    end: float
    num_chunks: int
    min_chunks: int
    chunk_seconds: float
    frames_per_chunk: int
    min_pixels: int
    max_pixels: int
    factor: int
    deadline_s: float
    root: str = ""
    size: int | None = None


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 28 * 28, max_pixels: int = 56 * 56
) -> tuple[int, int]:
    """Return the (height, width) that Qwen2-VL's processors resize a frame to.

    Both sides are rounded to the nearest multiple of `factor`. Only if that area leaves the pixel budget, the
    frame is scaled to the budget's border: downwards for a frame too large, upwards for one too small.
    """
    if min(height, width) < 1:
        raise ValueError(f"a frame of {width}x{height} pixels cannot be resized")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a frame of {width}x{height} pixels has an aspect ratio above {MAX_ASPECT_RATIO}")
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor * factor
    if area > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def frame_times(start: float, num_chunks: int, chunk_seconds: float, frames_per_chunk: int) -> np.ndarray:
    """Return the times to ask for, float64 [num_chunks, frames_per_chunk]: the middles of equal parts of every chunk.

    They count from the start of the stream and do not depend on its length, so a longer clip begins with the same
    frames.
    """
    chunks = np.arange(num_chunks, dtype=np.float64)[:, None]
    parts = np.arange(frames_per_chunk, dtype=np.float64)[None, :]
    return start + chunks * chunk_seconds + (parts + 0.5) * (chunk_seconds / frames_per_chunk)


def causal_limits(times: np.ndarray, end: float) -> np.ndarray:
    """Return, for every time asked for, the latest presentation time of a picture that may be shown for it.

    Such a picture appeared by then, and before the segment's `end`.
    """
    return np.minimum(times + TIME_TOLERANCE_S, np.nextafter(end - TIME_TOLERANCE_S, -np.inf))


def clip_chunks(film: Presentation, request: ClipRequest) -> int:
    """Return how many chunks of the clip the film has. Raises DecodeError if it does not cover those it must."""
    film.check_span(request.end)
    if math.isfinite(request.end):
        return request.num_chunks
    whole = math.ceil((film.end - request.start) / request.chunk_seconds - 1e-6)
    chunks = max(request.min_chunks, min(request.num_chunks, whole))
    last = request.start + (chunks - 1) * request.chunk_seconds
    if last > film.end + film.usual:
        raise DecodeError(f"chunk {chunks - 1} starts at {last:g} s but the file holds {film.end:.2f} s")
    return chunks


def decode_clip(request: ClipRequest) -> np.ndarray:
    """Decode the clip's frames, resized: uint8 [num_chunks, frames_per_chunk, H, W, 3]. Raises DecodeError."""
    import av

    times = frame_times(request.start, request.num_chunks, request.chunk_seconds, request.frames_per_chunk)
    limits = causal_limits(times, request.end).ravel().tolist()
    failure: DecodeError | None = None
    clip = _Clip(limits, request)
    # One pass: decoding stops at the last picture that is asked for, the film's length comes from the packets after it.
    with opened(request.video, "it cannot be decoded") as (container, stream):
        survey = Survey(container, stream)
        try:
            clip.fill(survey.frames())
        except DecodeError as error:
            failure = error
        except MemoryError:
            raise
        except av.FFmpegError as error:
            failure = refused("it cannot be decoded", error)
        film = survey.presentation(request.video)
    # Checked before `finish`: a row that is longer than its film explains why decoding did not get that far.
    chunks = clip_chunks(film, request)
    pictures = clip.finish(film, failure)[: chunks * request.frames_per_chunk]
    if len({picture.shape for picture in pictures}) != 1:
        raise DecodeError("its frames change size on the way")
    return np.stack(pictures).reshape(chunks, request.frames_per_chunk, *pictures[0].shape)


class _Clip:
    """For every limit the last picture that appears by then, resized; black before the first one.

    limits: seconds on the film's clock, ascending.
    """

    def __init__(self, limits: list[float], request: ClipRequest) -> None:
        from av.video.reformatter import VideoReformatter

        self._limits, self._request = limits, request
        self._convert = VideoReformatter()
        self._shown: list[np.ndarray] = []
        self._latest: VideoFrame | None = None
        self._time = -math.inf

    def fill(self, frames: Iterable[VideoFrame]) -> None:
        """Keep the pictures that are asked for, as far as the frames go, from the beginning of the file forwards.

        Never by seeking: with open GOPs, and with B-frames in fragmented MP4 or in FLV, a seek lands on other pictures,
        often later ones, and reports nothing. Only pictures that are asked for are converted to RGB.
        """
        due = iter(self._limits)
        limit = next(due)
        for frame in frames:
            time = frame.time
            if time is None:
                raise DecodeError(f"its frames have no usable timestamps ({REMUX})")
            if time < self._time:
                raise DecodeError(DISORDER)
            if limit < time:
                before = self._latest
                picture = np.zeros_like(self._pixels(frame)) if before is None else self._pixels(before)
                while limit < time:
                    self._shown.append(picture)
                    limit = next(due, math.inf)
            self._latest, self._time = frame, time
            if limit == math.inf:
                return

    def finish(self, film: Presentation, failure: DecodeError | None) -> list[np.ndarray]:
        """Return one picture for every limit: the last one stays on screen. failure: why decoding ended early, if so.

        Raises DecodeError if a picture is missing.
        """
        missing = len(self._limits) - len(self._shown)
        if self._latest is None or (missing and self._time < film.last - TIME_TOLERANCE_S):
            held = "nothing" if self._latest is None else f"the frame of {self._time:.2f} s"
            raise failure or DecodeError(
                f"the file promises frames until {film.last:.2f} s but ends after {held}, it is truncated or damaged"
            )
        # A failure after the last picture does not matter: it is the end of a truncated file.
        return self._shown + ([self._pixels(self._latest)] * missing if missing else [])

    def _pixels(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3], upright as a player shows it, and resized. Turns by multiples of 90 degrees and mirrors apply."""
        plain = self._convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
        # The angle says where the rows go; if the picture is mirrored, the columns go the other way.
        turned = np.rot90(plain[::-1] if mirrored(frame) else plain, round(frame.rotation / 90))
        return resize_frame(turned, self._request)


def mirrored(frame: VideoFrame) -> bool:
    """Return whether the display matrix mirrors the picture, as with some front cameras."""
    from av.sidedata.sidedata import SideData

    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        return False  # PyAV fails to list side data if FFmpeg attached a kind that it has no name for (Exif)
    if not isinstance(matrix, SideData):
        return False
    # Nine native 32-bit integers, row by row: the first two of the first two rows turn, scale and mirror.
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return bool(a * d < b * c)


def resize_frame(frame: np.ndarray, request: ClipRequest) -> np.ndarray:
    """Resize with bicubic interpolation on 8-bit pixels, as the image processor does, to see the same picture."""
    try:
        height, width = smart_resize(
            frame.shape[0], frame.shape[1], request.factor, request.min_pixels, request.max_pixels
        )
    except ValueError as error:
        raise DecodeError(str(error)) from None
    if frame.shape[:2] == (height, width):
        return np.ascontiguousarray(frame)
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))


def refuse_file(request: ClipRequest, seen: SeenFiles) -> None:
    """Raise DecodeError for a row's file that the request may not open, or that is not what it was."""
    if not request.root:
        return
    if refusal := outside(request.video, request.root):
        raise DecodeError(refusal)
    try:
        status = os.stat(request.video)
    except OSError as error:
        raise DecodeError(f"the file cannot be read ({error.strerror})") from None
    if refusal := kind_refused(status.st_mode) or seen.changed(request.video, status, request.size):
        raise DecodeError(refusal)


def serve(connection: Connection) -> None:
    """Answer requests until the parent closes its end.

    A reply is ("frames", array), ("presentation", what is shown) or ("error", reason).
    """
    seen = SeenFiles()
    connection.send(READY)
    while True:
        try:
            # The wait for the next request has no deadline of its own: it ends with the parent, by end of file.
            kind, fields = connection.recv()
        except EOFError:
            return
        request = ClipRequest(**fields) if kind == ClipRequest.kind else DurationRequest(**fields)
        # The kernel ends this process if it is still stuck when nobody is left to kill it.
        signal.alarm(math.ceil(request.deadline_s) + ORPHAN_GRACE_S)
        try:
            reply: tuple[str, object]
            if isinstance(request, ClipRequest):
                refuse_file(request, seen)
                reply = ("frames", decode_clip(request))
            else:
                reply = ("presentation", presentation(request.video))
        except DecodeError as error:
            reply = ("error", str(error))
        except MemoryError:
            reply = ("error", "its frames do not fit into memory")
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return
        signal.alarm(0)


def main() -> None:
    # The parent handles Ctrl-C and closes the pipe; a traceback from here would only hide its message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()

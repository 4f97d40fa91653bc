"""The decode process: reads clips with decord, one request at a time, until its pipe closes.

Owner: streams. Started by `streams.video.ClipReader` as `python -m streams.decode <fd>`; native decoding can
block for ever while it holds the interpreter, so only a process of its own can be given a deadline. Imports
stay light. Invariants: a frame is never later than the time it was asked for (to 1 ms); decord is only ever
read forwards from frame 0; the process ends when its parent does (end of file on the pipe, or the alarm while
it is stuck in native code).
"""

from __future__ import annotations

import math
import os
import re
import signal
import stat
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np
from PIL import Image

MAX_ASPECT_RATIO = 200
DURATION_SLACK_S = 0.5
"""A row's end may exceed the file's last frame by one frame and this much: durations are often rounded up."""
TIME_TOLERANCE_S = 1e-3
"""decord gives float32 timestamps: without a tolerance a frame at 0.3 s (0.30000001) is missed when asked at
0.3.
"""
ORPHAN_GRACE_S = 5
READY = "ready"


class DecodeError(ValueError):
    """Why a clip cannot be read, in words for the user; the parent adds the file's name."""


@dataclass(frozen=True)
class DurationRequest:
    """Ask for the length of a video. deadline_s: how long the parent will wait."""

    kind: ClassVar[str] = "duration"
    video: str
    deadline_s: float


@dataclass(frozen=True)
class ClipRequest:
    """What to read. factor: frame sides become multiples of it. deadline_s: how long the parent will wait.

    end: infinite = as far as the video goes: fewer chunks than num_chunks then come back, if need be only min_chunks.
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


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 28 * 28, max_pixels: int = 56 * 56
) -> tuple[int, int]:
    """The (height, width) that Qwen2-VL's processors resize a frame to.

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
    """Times asked for, float64 [num_chunks, frames_per_chunk]: the middles of equal parts of every chunk.

    They are counted from the start of the stream and know nothing of its length, so a longer clip has the
    same frames.
    """
    chunks = np.arange(num_chunks, dtype=np.float64)[:, None]
    parts = np.arange(frames_per_chunk, dtype=np.float64)[None, :]
    return start + chunks * chunk_seconds + (parts + 0.5) * (chunk_seconds / frames_per_chunk)


def causal_indices(timestamps: np.ndarray, times: np.ndarray, end: float) -> np.ndarray:
    """For every time the last frame that had been shown by then, and before the segment's `end`."""
    found = np.searchsorted(timestamps, times + TIME_TOLERANCE_S, side="right") - 1
    last = np.searchsorted(timestamps, end - TIME_TOLERANCE_S, side="left") - 1
    return np.maximum(np.minimum(found, last), 0)


def check_container(video: str) -> None:
    """Rejects missing and empty files, and containers for which decord's frames are not those of their
    timestamps.

    Measured with decord2 3.4: in MPEG-TS and MPEG-PS it drops the frames of the first second and shows later
    ones in their place; AVI has no timestamps. MP4, MOV, MKV, WebM and FLV are exact when they are read
    forwards.
    """
    try:
        status = os.stat(video)
    except OSError as error:
        raise DecodeError(f"the file cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(status.st_mode):
        raise DecodeError("it is a folder, not a video file")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise DecodeError("the file is empty (0 bytes)")
    try:
        with open(video, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise DecodeError(f"the file cannot be read ({error.strerror})") from None
    boxes = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
    if head[4:8] in boxes or head.startswith((b"\x1aE\xdf\xa3", b"FLV")):
        return
    raise DecodeError(
        f"not a supported video: it starts with {head[:8]!r}, not like MP4, MOV, MKV, WebM or FLV "
        "(other containers can be converted with `ffmpeg -i IN -c copy OUT.mkv`)"
    )


def plain_frame(raw: np.ndarray) -> np.ndarray:
    """A uint8 [h, w, 3] frame out of what decord returned.

    At widths where its padded rows hold a whole multiple of w bytes (16, 24, 48, 72), decord calls the
    padding extra channels: [h, w, 4 or 6]. The pixels are all there, at the beginning of each row.
    """
    if raw.dtype != np.uint8 or raw.ndim != 3 or raw.shape[2] < 3:
        raise DecodeError(f"decord returned a frame of shape {list(raw.shape)} and type {raw.dtype}")
    height, width, channels = raw.shape
    if channels == 3:
        return raw
    return raw.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)


def clip_timestamps(reader: Any, request: ClipRequest) -> tuple[np.ndarray, int]:
    """(start times of the file's frames, in seconds after its first frame; chunks to show), once they are known to
    cover the clip.
    """
    starts, held = frame_starts(reader)
    # Some files give the last frame no length; the usual distance between frames stands in.
    usual = float(np.median(np.diff(starts))) if len(starts) > 1 else 0.0
    held = max(held, float(starts[-1]) + usual)
    slack = usual + DURATION_SLACK_S
    chunks = request.num_chunks
    if math.isinf(request.end):
        whole = math.ceil((held - request.start) / request.chunk_seconds - 1e-6)
        chunks = max(request.min_chunks, min(chunks, whole))
    elif request.end > held + slack:
        raise DecodeError(
            f"the row says the clip lasts until {request.end:g} s "
            f"but the file holds {held:.2f} s ({len(starts)} frames)"
        )
    last_chunk = request.start + (chunks - 1) * request.chunk_seconds
    if last_chunk > held + usual:
        raise DecodeError(f"chunk {chunks - 1} starts at {last_chunk:g} s but the file holds {held:.2f} s")
    return starts, chunks


def frame_starts(reader: Any) -> tuple[np.ndarray, float]:
    """(start times of all frames, end of the last one), in seconds after the file's first frame."""
    spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
    starts = spans[:, 0] - spans[0, 0]
    if not np.isfinite(spans).all() or abs(spans[0, 0]) > 1e6 or (np.diff(starts) < 0).any():
        raise DecodeError(
            "its frames have no usable timestamps (remux it: `ffmpeg -fflags +genpts -i IN -c copy OUT.mp4`)"
        )
    return starts, float(spans[-1, 1] - spans[0, 0])


def video_duration(video: str) -> float:
    """Seconds of video, from the container's header; a file whose header does not say is read through."""
    import av
    import decord

    check_container(video)
    try:
        with av.open(video) as container:
            if not container.streams.video:
                raise DecodeError("it holds no video")
            stream = container.streams.video[0]
            if stream.duration and stream.time_base:
                return float(stream.duration * stream.time_base)
            if container.duration:
                return float(container.duration / av.time_base)
        return frame_starts(decord.VideoReader(video, num_threads=1))[1]
    except (av.FFmpegError, decord.DECORDError, RuntimeError) as error:
        raise DecodeError(f"its length cannot be read, the file is truncated or damaged ({short(error)})") from None


def decode_clip(request: ClipRequest) -> np.ndarray:
    """The clip's frames, resized: uint8 [num_chunks, frames_per_chunk, H, W, 3]."""
    import decord

    check_container(request.video)
    try:
        reader = decord.VideoReader(request.video, num_threads=1)
        starts, chunks = clip_timestamps(reader, request)
        times = frame_times(request.start, chunks, request.chunk_seconds, request.frames_per_chunk)
        indices = causal_indices(starts, times, request.end)
        frames: dict[int, np.ndarray] = {}
        wanted = set(indices.ravel().tolist())
        # Forwards from frame 0, without seek or skip_frames: with open GOPs, and with B-frames in fragmented
        # MP4 or in FLV, both land on other frames, often LATER ones, and report nothing. Reading on runs at
        # thousands of frames a second. decord decodes ahead: in a damaged file, frames shortly before the
        # damage may be refused or given.
        for index in range(max(wanted) + 1):
            frame = reader.next()
            if index in wanted:
                frames[index] = resize_frame(plain_frame(frame.asnumpy()), request)
    except StopIteration:
        raise DecodeError(f"the file promises {len(starts)} frames but ends after {index}") from None
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise DecodeError(f"decord cannot decode it, the file is truncated or damaged ({short(error)})") from None
    if len({frame.shape for frame in frames.values()}) != 1:
        raise DecodeError("its frames change size on the way")
    return np.stack([np.stack([frames[int(i)] for i in row]) for row in indices])


def resize_frame(frame: np.ndarray, request: ClipRequest) -> np.ndarray:
    """Bicubic on 8-bit pixels, as the image processor does it, so that both see the same picture."""
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


def short(error: BaseException) -> str:
    """The last statement of a decord message, without its C++ source positions."""
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", str(error)).split("\n\n")[0]
    return " ".join(text.rsplit("Thread worker: ", 1)[-1].split())[-160:] or type(error).__name__


def serve(connection: Connection) -> None:
    """Answers requests until the parent closes its end: ("frames", array), ("seconds", number) or ("error", reason)."""
    connection.send(READY)
    while True:
        try:
            # The wait for the next request has no deadline of its own: it ends with the parent, by end of
            # file.
            kind, fields = connection.recv()
        except EOFError:
            return
        request = ClipRequest(**fields) if kind == ClipRequest.kind else DurationRequest(**fields)
        # The kernel ends this process if it is still stuck when nobody is left to kill it.
        signal.alarm(math.ceil(request.deadline_s) + ORPHAN_GRACE_S)
        try:
            reply: tuple[str, object]
            if isinstance(request, ClipRequest):
                reply = ("frames", decode_clip(request))
            else:
                reply = ("seconds", video_duration(request.video))
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
    import decord

    # The parent handles Ctrl-C and closes the pipe; a traceback from here would only hide its message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    decord.logging.set_level(decord.logging.QUIET)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()

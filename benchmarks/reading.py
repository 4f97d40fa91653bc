"""Time the reading of clips: `streams.video.decode` beside the reader that it replaced, decord read from the first frame.

    python -m benchmarks.reading --json benchmarks/results/reading_cpu.json
    python -m benchmarks.reading --quick --json -

Both read whole clips at 2 frames a second from ordinary H.264 films (textured, moving, with B-frames), as a decode process
does: open, find the length, decode, convert, resize. They alternate in one process; the minimum of several runs counts, since
other processes only add time. "first" reads a file that is new to the process, "again" one whose length it knows, as in the
next epoch. Pixels must be equal, bit for bit. Exit status 1: pixels differ, or ours takes more than 1.1 times as long in any
row. Needs decord2 (extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.environment import hardware, result_target, versions, write_result
from streams.video import presentation
from streams.video.decode import TIME_TOLERANCE_S, ClipRequest, decode_clip, frame_times, resize_frame

SIZES = ((56, 56, 10), (640, 360, 30), (1280, 720, 30))
"""(width, height, frames a second)"""
SECONDS = (10, 60)
QUICK = ((56, 56, 10),)
BAR = 1.1
CHEAP_MS = 200
"""Clips that take less are read more often: one interruption would dominate their time."""


def write_film(path: Path, width: int, height: int, rate: int, seconds: int) -> None:
    """Write moving noise as H.264, with the B-frames of a common preset."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8 + 9, width // 8 + 9, 3), dtype=np.uint8)
    noise = coarse.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream: av.VideoStream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for i in range(rate * seconds):
            down, right = (i // 3) % 64, i % 64
            image = np.ascontiguousarray(noise[down : down + height, right : right + width])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def former(request: ClipRequest) -> np.ndarray:
    """Read as the former reader did: decord's index selects frames; every frame up to the last of them is converted."""
    import decord

    reader = decord.VideoReader(request.video, num_threads=1)
    spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
    starts = spans[:, 0] - spans[0, 0]
    times = frame_times(request.start, request.num_chunks, request.chunk_seconds, request.frames_per_chunk)
    indices = np.maximum(np.searchsorted(starts, times + TIME_TOLERANCE_S, side="right") - 1, 0)
    wanted = set(indices.ravel().tolist())
    frames = {}
    for index in range(max(wanted) + 1):
        frame = reader.next()
        if index in wanted:
            raw = frame.asnumpy()
            height, width, channels = raw.shape  # decord calls the padding of some widths extra channels
            plain = raw.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)
            frames[index] = resize_frame(plain, request)
    return np.stack([np.stack([frames[int(i)] for i in row]) for row in indices])


def taken(read: Callable[[ClipRequest], np.ndarray], request: ClipRequest) -> tuple[np.ndarray, float]:
    """Return the clip, and the milliseconds that reading it took."""
    began = time.perf_counter()
    clip = read(request)
    return clip, (time.perf_counter() - began) * 1e3


def measure(folder: Path, width: int, height: int, rate: int, seconds: int, repeats: int) -> dict[str, Any]:
    """Measure one film. All three ways alternate, after one warm-up that is not timed."""
    path = folder / f"{width}x{height}_{seconds}.mp4"
    write_film(path, width, height, rate, seconds)
    request = ClipRequest(str(path), 0.0, math.inf, seconds, 1, 1.0, 2, 28 * 28, 56 * 56, 28, 60.0)
    wanted, once = taken(former, request)
    same = np.array_equal(decode_clip(request), wanted)
    times: dict[str, list[float]] = {"former": [], "first": [], "again": []}
    for _ in range(repeats * (5 if once < CHEAP_MS else 1)):
        times["former"].append(taken(former, request)[1])
        presentation.forget()
        times["first"].append(taken(decode_clip, request)[1])
        times["again"].append(taken(decode_clip, request)[1])
    least = {name: min(found) for name, found in times.items()}
    return {
        "film": f"{width}x{height}, {rate} a second, {seconds} s",
        **{f"{name}_ms": round(found, 2) for name, found in least.items()},
        "first_ratio": round(least["first"] / least["former"], 3),
        "again_ratio": round(least["again"] / least["former"], 3),
        "equal": same,
    }


def missed(row: dict[str, Any]) -> list[str]:
    """Return why this row fails; [] if it passes."""
    found = [] if row["equal"] else [f"{row['film']}: the pixels differ from the former reader's"]
    slow = [name for name in ("first_ratio", "again_ratio") if row[name] > BAR]
    return found + [f"{row['film']}: {name} {row[name]} is above {BAR}" for name in slow]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.reading")
    parser.add_argument("--quick", action="store_true", help="the smallest film only")
    parser.add_argument("--repeats", type=int, default=9, help="five times as many of clips that take below 0.2 s")
    parser.add_argument("--note", default="", help="anything that the reader must know, e.g. a shared machine")
    parser.add_argument("--json", type=result_target, default="-", help="file to write, - for the terminal")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(Path(folder), *size, seconds, options.repeats)
            for size in (QUICK if options.quick else SIZES)
            for seconds in SECONDS
        ]
    failures = [text for row in rows for text in missed(row)]
    measured = {"note": options.note, "repeats": options.repeats, "rows": rows, "ok": not failures}
    if options.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **measured}, indent=2))
    else:
        write_result(Path(options.json), measured)
    for line in failures:
        print(f"benchmarks.reading: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Video clips for tests: written with PyAV as H.264, so colours come back only approximately."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from streams.data.synthetic.scenes import write_clip

__all__ = ["grey_ramp", "solid", "write_clip", "write_endless", "write_grey_ramp"]

GREY_STEP = 2


def solid(colour: tuple[int, int, int], count: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (count, height, width, 3)).copy()


def grey_ramp(count: int, height: int = 56, width: int = 56) -> np.ndarray:
    """Return frames uint8 [count, height, width, 3]: frame i has the grey level 10 + 2 i, which tells its index (up to 120)."""
    levels = (10 + GREY_STEP * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def frame_number(frame: np.ndarray) -> float:
    """Return which frame of a grey ramp this is, to about +-0.5."""
    return (float(frame.mean()) - 10) / GREY_STEP


def write_endless(path: Path) -> Path:
    """Write what begins like a Matroska file and goes on with a tebibyte of zeros, none of it on the disk.

    FFmpeg looks for the next element in them for longer than any deadline.
    """
    with path.open("wb") as file:
        file.write(b"\x1aE\xdf\xa3\x80\x86")
        file.truncate(2**40)
    return path


def write_grey_ramp(path: Path, count: int, fps: float, options: dict[str, str] | None = None) -> Path:
    write_clip(path, grey_ramp(count), fps, options)
    return path

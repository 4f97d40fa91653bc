"""Streaming M-RoPE: the position ids of a stream, chunk by chunk, with a running offset.

The project owns this rule because `get_rope_index` differs between transformers releases.

Invariants:
* positions depend only on what was appended before (causal);
* eviction never changes them.

Sources: Qwen2.5-VL technical report (arXiv 2502.13923), section 2.1.2: the temporal id is time; Qwen3-VL technical
report (arXiv 2511.21631): time is written as text, every temporal patch is a vision block of its own. In both the offset
after a vision block is the largest position used so far plus one, as the published checkpoints were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Block = tuple[tuple[int, int, int], tuple[int, ...] | None]
"""A vision block: its merged grid (t, h, w), and which of its cells are kept; None = all."""
Shape = int | Block
"""What positions depend on: a number of text tokens, or a vision block."""

QWEN2_5_VL_CONVENTION = "qwen2_5_vl:absolute-time:max-plus-one"
QWEN3_VL_CONVENTION = "qwen3_vl:timestamp-text:max-plus-one"


@dataclass
class PositionCursor:
    """Returns int32 [3, n] position ids (temporal, height, width) and advances the offset.

    Attributes:
        tokens_per_second: temporal scale of the checkpoint's vision config.
        patch_seconds: time between two temporal patches of one chunk. Temporal ids of patch k are
            floor(k * patch_seconds * tokens_per_second) past the offset, computed in floating point so that sub-second
            patches do not collapse onto one another.
        offset: the next free position.
    """

    tokens_per_second: float
    patch_seconds: float
    offset: int = 0

    def text(self, n: int) -> np.ndarray:
        """Return the positions of n text tokens: the same id on all three axes."""
        ids = _line(n) + self.offset
        self.offset += n
        return ids

    def video(self, grid: tuple[int, int, int], keep: tuple[int, ...] | None = None) -> np.ndarray:
        """Return the positions of one chunk; `grid` is merged (t, h, w). Dropped tokens still advance the offset."""
        return self.run(((grid, keep),))

    def run(self, shapes: tuple[Shape, ...]) -> np.ndarray:
        """Return the positions of texts and vision blocks that follow one another."""
        relative, advance = _relative(shapes, self.tokens_per_second, self.patch_seconds)
        ids = relative + self.offset
        self.offset += advance
        return ids


@lru_cache(maxsize=256)
def _line(n: int) -> np.ndarray:
    """Return the positions of n text tokens that begin at 0, int32 [3, n]."""
    ids = np.tile(np.arange(n, dtype=np.int32), (3, 1))
    ids.setflags(write=False)
    return ids


@lru_cache(maxsize=256)
def _relative(shapes: tuple[Shape, ...], tokens_per_second: float, patch_seconds: float) -> tuple[np.ndarray, int]:
    """Return (positions int32 [3, n], where the next position is) of a run that begins at 0.

    Most turns of most streams look alike, and what a turn shows is laid out once for all of them.
    """
    parts, offset = [np.zeros((3, 0), np.int32)], 0
    for shape in shapes:
        if isinstance(shape, int):
            block = _line(shape)
            advance, keep = shape, None
        else:
            (t, h, w), keep = shape
            # 1e-9: rounding must not take a whole product below its whole number.
            patch = np.floor(np.arange(t) * patch_seconds * tokens_per_second + 1e-9).astype(np.int32)
            block = np.stack(
                [
                    np.repeat(patch, h * w),
                    np.tile(np.repeat(np.arange(h, dtype=np.int32), w), t),
                    np.tile(np.arange(w, dtype=np.int32), t * h),
                ]
            )
            advance = int(block.max()) + 1
        parts.append((block if keep is None else block[:, list(keep)]) + np.int32(offset))
        offset += advance
    ids = np.concatenate(parts, axis=1)
    ids.setflags(write=False)
    return ids, offset


@dataclass
class TimestampCursor(PositionCursor):
    """Qwen3-VL's rule: position ids carry no time, so a vision block is one temporal patch and its ids start together."""

    tokens_per_second: float = 0.0
    patch_seconds: float = 0.0

    def run(self, shapes: tuple[Shape, ...]) -> np.ndarray:
        """Raises ValueError for a vision block of several temporal patches: they would share one temporal id."""
        for shape in shapes:
            if not isinstance(shape, int) and shape[0][0] != 1:
                raise ValueError(
                    f"a vision block of {shape[0][0]} temporal patches: with timestamps in the text each has its own"
                )
        return super().run(shapes)

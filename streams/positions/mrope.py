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

import numpy as np

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
        ids = np.arange(self.offset, self.offset + n, dtype=np.int32)
        self.offset += n
        return np.broadcast_to(ids, (3, n))

    def video(self, grid: tuple[int, int, int], keep: tuple[int, ...] | None = None) -> np.ndarray:
        """Return the positions of one chunk; `grid` is merged (t, h, w). Dropped tokens still advance the offset."""
        t, h, w = grid
        # 1e-9: rounding must not take a whole product below its whole number.
        patch = np.floor(np.arange(t) * self.patch_seconds * self.tokens_per_second + 1e-9).astype(np.int32)
        ids = np.stack(
            [
                np.repeat(patch, h * w),
                np.tile(np.repeat(np.arange(h, dtype=np.int32), w), t),
                np.tile(np.arange(w, dtype=np.int32), t * h),
            ]
        )
        ids = ids + self.offset
        self.offset = int(ids.max()) + 1
        return ids if keep is None else ids[:, list(keep)]


@dataclass
class TimestampCursor(PositionCursor):
    """Qwen3-VL's rule: position ids carry no time, so a vision block is one temporal patch and its ids start together."""

    tokens_per_second: float = 0.0
    patch_seconds: float = 0.0

    def video(self, grid: tuple[int, int, int], keep: tuple[int, ...] | None = None) -> np.ndarray:
        """Return the positions of one temporal patch. Raises ValueError for several: they would share one temporal id."""
        if grid[0] != 1:
            raise ValueError(
                f"a vision block of {grid[0]} temporal patches: with timestamps in the text each has its own"
            )
        return super().video(grid, keep)

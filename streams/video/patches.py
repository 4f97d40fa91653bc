"""Frames as the rows that the vision tower takes.

Invariant: pixels stay uint8 until `normalize_patches`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def patchify(frames: np.ndarray, patch_size: int = 14, temporal_patch_size: int = 2, merge_size: int = 2) -> np.ndarray:
    """Turn uint8 [T, H, W, 3] into the rows of Qwen2-VL's processors, uint8 [patches, 3 * time * patch * patch].

    Rows go through time, then through blocks of merge_size x merge_size patches, so that the patches that become one
    token are neighbours. Columns are channel, time, row, column. Raises ValueError for frames of another shape or type.
    """
    count, height, width, channels = frames.shape
    side = patch_size * merge_size
    if frames.dtype != np.uint8 or channels != 3 or count % temporal_patch_size or height % side or width % side:
        raise ValueError(
            f"frames of shape {list(frames.shape)} and type {frames.dtype} must be uint8 [T, H, W, 3] with T "
            f"a multiple of {temporal_patch_size} and H, W multiples of {side}"
        )
    split = frames.reshape(
        count // temporal_patch_size,
        temporal_patch_size,
        height // side,
        merge_size,
        patch_size,
        width // side,
        merge_size,
        patch_size,
        channels,
    )
    rows_first = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(rows_first).reshape(-1, channels * temporal_patch_size * patch_size * patch_size)


def normalize_patches(patches: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (x / 255 - mean) / std per channel, in float32 and in the layout of `patchify`."""
    import torch  # here, so that readers of this module need not load it

    if patches.dtype != torch.uint8 or patches.shape[-1] % 3:
        raise ValueError(f"patches of shape {list(patches.shape)} and type {patches.dtype} must be uint8 [.., 3 * n]")
    shape = (*patches.shape[:-1], 3, patches.shape[-1] // 3)
    rows = patches.reshape(shape).to(torch.float32)
    centre = torch.tensor(mean, dtype=torch.float32, device=patches.device)[:, None]
    spread = torch.tensor(std, dtype=torch.float32, device=patches.device)[:, None]
    # In place: pixels as float32 are most of what a small tower holds.
    return rows.div_(255).sub_(centre).div_(spread).reshape(patches.shape)

"""The vision tower: clips to features, and the boundary before its mergers.

For each video token the mergers turn `merge_size ** 2` hidden vectors of the tower into one row for the text model:
`visual.merger` makes its embedding, Qwen3-VL's `visual.deepstack_merger_list[i]` DeepStack level i. A pre-merger row is
those hidden vectors side by side, first the merger's, then every level's.

Invariants:
* rows of both sorts are in raster order of the video tokens, whatever order the tower works in;
* merging pre-merger rows gives the tower's own features;
* a call runs each merger once, however many clips it is given;
* no frame sees another one, so a clip may be cut anywhere between its chunks: only rounding can differ;
* one thread may encode while another merges: no call changes a module.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from streams.backbone.slices import chunks_per_slice
from streams.checkpoint.folder import ImageSpec
from streams.video.patches import normalize_patches, patchify


def mergers(visual: Any) -> list[Any]:
    """Return the modules between tower and text model, in the order of the parts of a row."""
    return [visual.merger, *getattr(visual, "deepstack_merger_list", ())]


def pre_merger_width(vision_config: Any) -> int:
    """Return P: values per video token before the mergers, for the last layer and every DeepStack level."""
    levels = len(getattr(vision_config, "deepstack_visual_indexes", ()))
    return int(vision_config.spatial_merge_size) ** 2 * int(vision_config.hidden_size) * (1 + levels)


def encode(visual: Any, image: ImageSpec, clips: list[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """Encode clips, each uint8 [chunks, frames, h, w, 3] -> features [chunks, tokens, F], in one call of the tower."""
    patches, grids = [], []
    for clip in clips:
        patches += [patchify(chunk, image.patch_size, image.temporal_patch_size, image.merge_size) for chunk in clip]
        grids += [_grid(image, clip)] * len(clip)
    device = next(visual.parameters()).device
    pixels = normalize_patches(torch.from_numpy(np.concatenate(patches)).to(device), image.mean, image.std)
    made = visual(pixels.to(dtype), grid_thw=torch.tensor(grids, dtype=torch.long, device=device))
    features = torch.cat([made.pooler_output, *getattr(made, "deepstack_features", ())], dim=-1)
    per_chunk = torch.split(features, [int(np.prod(grid)) // image.merge_size**2 for grid in grids])
    out, at = [], 0
    for clip in clips:
        out.append(torch.stack(per_chunk[at : at + len(clip)]))
        at += len(clip)
    return out


def _grid(image: ImageSpec, frames: np.ndarray) -> tuple[int, int, int]:
    """Return the patches of one chunk, before merging: time, rows, columns."""
    _, count, height, width, _ = frames.shape
    return count // image.temporal_patch_size, height // image.patch_size, width // image.patch_size


class ClipEncoding:
    """A clip on its way through the tower: some chunks a call, without gradient, into one tensor.

    The memory it needs besides that tensor is that of one call (`streams.backbone.slices`).

    Attributes:
        nbytes: of the whole tensor, which is made by the first call.
    """

    def __init__(
        self, visual: Any, image: ImageSpec, frames: np.ndarray, dtype: torch.dtype, *, pre_merger: bool, width: int
    ) -> None:
        """Begin with the first chunk.

        Args:
            frames: uint8 [chunks, frames, h, w, 3].
            pre_merger: make the rows before the mergers, instead of features.
            width: values of such a row.
        """
        self._visual = without_mergers(visual) if pre_merger else visual
        self._image, self._frames, self._dtype = image, frames, dtype
        patches = int(np.prod(_grid(image, frames)))
        self._shape = (len(frames), patches // image.merge_size**2, width)
        device = next(visual.parameters()).device.type
        self._patches, self._slice = patches, chunks_per_slice(patches, device)
        self._made: torch.Tensor | None = None
        self._at = 0

    @property
    def nbytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    @property
    def done(self) -> bool:
        return self._at >= len(self._frames)

    @torch.no_grad()
    def advance(self) -> int:
        """Encode the next chunks, in one call of the tower; returns how many patches that took."""
        chunks = self._frames[self._at : self._at + self._slice]
        (made,) = encode(self._visual, self._image, [chunks], self._dtype)
        if self._made is None:
            self._made = made.new_empty(self._shape)
        self._made[self._at : self._at + len(chunks)] = made
        self._at += len(chunks)
        return len(chunks) * self._patches

    def finish(self) -> torch.Tensor:
        """Encode what is left and return the clip's rows, [chunks, tokens, width]."""
        while not self.done:
            self.advance()
        assert self._made is not None
        return self._made


def merge(visual: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return features [chunks, tokens, F] of pre-merger rows [chunks, tokens, P], through the current mergers."""
    modules = mergers(visual)
    hidden = int(visual.config.hidden_size)
    parts = torch.cat([clip.flatten(0, 1) for clip in rows]).chunk(len(modules), dim=-1)
    # A merger takes the tower's hidden vectors, merge_size ** 2 in a row for every token.
    features = torch.cat([m(part.reshape(-1, hidden)) for m, part in zip(modules, parts, strict=True)], dim=-1)
    split = torch.split(features, [clip.shape[0] * clip.shape[1] for clip in rows])
    return [made.view(*clip.shape[:2], -1) for made, clip in zip(split, rows, strict=True)]


class _RowsOf(nn.Module):
    """Stands in the place of a merger and hands on what that would be given, as one row a token."""

    def __init__(self, merger: Any) -> None:
        super().__init__()
        self._width = int(merger.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.reshape(-1, self._width)


def without_mergers(visual: Any) -> Any:
    """Return the tower with nothing in the place of its mergers; all else is shared with `visual`.

    So the tower itself puts their input into raster order, and no code of transformers is repeated here. A hook on the
    mergers would also be in the way of a thread that merges meanwhile.
    """
    tower = copy.copy(visual)
    tower._modules = dict(visual._modules)
    tower.merger = _RowsOf(visual.merger)
    if levels := mergers(visual)[1:]:
        tower.deepstack_merger_list = nn.ModuleList(_RowsOf(level) for level in levels)
    return tower

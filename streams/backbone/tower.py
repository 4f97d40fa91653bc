"""The vision tower: clips to features, and the boundary before its mergers.

For each video token the mergers turn `merge_size ** 2` hidden vectors of the tower into one row for the text model:
`visual.merger` makes its embedding, Qwen3-VL's `visual.deepstack_merger_list[i]` DeepStack level i. A pre-merger row is
those hidden vectors side by side, first the merger's, then every level's.

Invariants:
* rows of both sorts are in raster order of the video tokens, whatever order the tower works in;
* merging pre-merger rows gives the tower's own features;
* a call runs each merger once, however many clips it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

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
        chunks, count, height, width, _ = clip.shape
        grid = (count // image.temporal_patch_size, height // image.patch_size, width // image.patch_size)
        patches += [patchify(chunk, image.patch_size, image.temporal_patch_size, image.merge_size) for chunk in clip]
        grids += [grid] * chunks
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


@torch.no_grad()
def encode_pre_merger(visual: Any, image: ImageSpec, clips: list[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the pre-merger rows of clips, [chunks, tokens, P] each, without gradient."""
    with _passing_through(mergers(visual)):
        return encode(visual, image, clips, dtype)


def merge(visual: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return features [chunks, tokens, F] of pre-merger rows [chunks, tokens, P], through the current mergers."""
    modules = mergers(visual)
    hidden = int(visual.config.hidden_size)
    parts = torch.cat([clip.flatten(0, 1) for clip in rows]).chunk(len(modules), dim=-1)
    # A merger takes the tower's hidden vectors, merge_size ** 2 in a row for every token.
    features = torch.cat([m(part.reshape(-1, hidden)) for m, part in zip(modules, parts, strict=True)], dim=-1)
    split = torch.split(features, [clip.shape[0] * clip.shape[1] for clip in rows])
    return [made.view(*clip.shape[:2], -1) for made, clip in zip(split, rows, strict=True)]


@contextmanager
def _passing_through(modules: list[Any]) -> Iterator[None]:
    """Make mergers return their input, token by token, so that the tower itself puts it into raster order.

    Their own output is thrown away, about 1.5 % of a tower's work; in return no code of transformers is repeated here.
    """

    def given(module: Any, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        return inputs[0].reshape(-1, module.hidden_size)

    hooks = [module.register_forward_hook(given) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

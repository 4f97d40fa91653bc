"""`rebuild`: no streaming engine at all; every turn is a fresh call of the checkpoint's own `generate` on what is visible.

Specification:
* the model is the exported checkpoint as transformers runs it (its attention, cache, positions and tower);
* a turn's input is the visible context: the live tokens of a finished log at the turn's first generated token, with the frames
  of the chunks whose video is live. G rows are one batch of one prompt; vision and prefill are computed for every row;
* one call of `generate` a turn, greedy, with the ban list; forced tokens come from a logits processor.

Positions are those of the context as it stands, and old text is computed anew without the video that it once saw: tokens equal
the engine's until something has been evicted, and are those of another model of memory afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from streams.backbone.backbone import Backbone
from streams.layout.layout import Layout
from streams.layout.turn_state import TurnState
from streams.log.record import GENERATED, Kind, StreamLog
from streams.video.patches import normalize_patches, patchify


class Rebuild:
    """Generates single turns of logs of one group. See the module docstring."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        """folder: where the checkpoint is exported to, with room for it once more."""
        self._layout, self._image = backbone.layout, backbone.image
        self._device, self._dtype = backbone.device, backbone.dtype
        backbone.save(folder, {})
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=backbone.dtype)
        self._model = model.to(backbone.device).eval()
        # A checkpoint's own settings for sampling are not the benchmark's.
        self._model.generation_config.eos_token_id = self._layout.tokens.im_end

    @torch.no_grad()
    def turn(self, logs: list[StreamLog], turn: int, frames: np.ndarray) -> tuple[list[list[int]], float]:
        """Return what each stream's turn would be, ids with END, and the seconds that it took.

        logs: of one group, whose contexts must be of one length here. frames: uint8 [chunks, frames, h, w, 3] of its clip.
        """
        contexts = [self._context(log, turn) for log in logs]
        shown = [[int(t) for t in np.unique(log.turn[rows][log.kind[rows] == Kind.VIDEO])] for log, rows in contexts]
        if len({len(rows) for _, rows in contexts}) > 1 or any(one != shown[0] for one in shown):
            raise ValueError(
                f"turn {turn}: the contexts of this group differ in length or video; rows cannot share a call"
            )
        began = time.perf_counter()
        ids = torch.from_numpy(np.stack([log.ids[rows] for log, rows in contexts]).astype(np.int64)).to(self._device)
        chunks = [[c.turn for c in logs[0].chunks].index(t) for t in shown[0]]
        pixels, grids = self._pixels(frames[chunks], len(logs))
        written = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=torch.where(ids == self._layout.tokens.video_pad, 2, 0),
            pixel_values_videos=pixels,
            video_grid_thw=grids,
            **({} if self._layout.timestamps else {"second_per_grid_ts": torch.ones(len(grids), dtype=torch.long)}),
            suppress_tokens=list(self._layout.banned),
            logits_processor=LogitsProcessorList([_Forced(self._layout, ids.shape)]),
            do_sample=False,
            max_new_tokens=self._layout.config.max_new_tokens,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return [_to_end(row, self._layout.tokens.im_end) for row in written[:, ids.shape[1] :].tolist()], seconds

    def _context(self, log: StreamLog, turn: int) -> tuple[StreamLog, np.ndarray]:
        first = int(np.flatnonzero((log.turn == turn) & np.isin(log.kind, GENERATED))[0])
        return log, np.flatnonzero(log.expiry[:first] > first)

    def _pixels(self, frames: np.ndarray, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        patch = self._image.patch_size
        pixels = torch.cat([torch.from_numpy(patchify(chunk, patch)) for chunk in frames]).to(self._device)
        pixels = normalize_patches(pixels, self._image.mean, self._image.std).to(self._dtype)
        grid = (frames.shape[1] // self._image.temporal_patch_size, frames.shape[2] // patch, frames.shape[3] // patch)
        return pixels.repeat(rows, 1), torch.tensor([grid] * (len(frames) * rows), device=self._device)


class _Forced(LogitsProcessor):
    """Leaves only the forced id where the layout forces one, and END to rows whose turn is over."""

    def __init__(self, layout: Layout, shape: torch.Size) -> None:
        self._states = [TurnState(layout.tokens, layout.config) for _ in range(shape[0])]
        self._end, self._seen = layout.tokens.im_end, shape[1]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row, state in enumerate(self._states):
            for token in input_ids[row, self._seen :].tolist():
                if not state.over:
                    state.advance([token])
            forced = self._end if state.over else state.forced()
            if forced is not None:
                scores[row] = float("-inf")
                scores[row, forced] = 0.0
        self._seen = input_ids.shape[1]
        return scores


def _to_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids

"""The clips of one worker: read once, encoded once at the freeze boundary, both kept under a byte budget.

Threads: the prepare thread calls `ClipFrames.read` and `ClipFeatures.given`, the engine thread the rest of `ClipFeatures`.
`ClipFrames` owns the decode process, through its reader; `ClipFrames.close` ends it, from any thread.

Invariants:
* streams that show a clip embed the same tensor: exactly the one shipped to the learner or, with freeze=tower, the current
  mergers' output for it;
* encoded clips are dropped when weights change that made them (`ClipFeatures.clear`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streams.backbone.backbone import Backbone, to_array, to_tensor
from streams.backbone.boundary import Boundary
from streams.support.byte_cache import ByteBudgetCache
from streams.support.meter import Meter
from streams.task import Plan, StreamTask
from streams.video.reader import Clip, ClipReader
from streams.writing.inputs import clip_key


@dataclass(frozen=True)
class Encoded:
    """A clip at the freeze boundary, [chunks, tokens, P or F] (see GroupPayload).

    reference: what ships it to the learner; None where the learner encodes frames itself.
    """

    tensor: torch.Tensor
    reference: Any


class ClipFrames:
    """Reads clips and keeps the last ones."""

    def __init__(self, reader: ClipReader, budget_bytes: int) -> None:
        self._reader = reader
        self._kept: ByteBudgetCache[Clip] = ByteBudgetCache(budget_bytes)

    def read(self, task: StreamTask, plan: Plan) -> Clip:
        """Return the chunks of the task that the plan shows. Raises VideoError, and ReaderClosedError after `close`."""
        key = clip_key(task, plan.turns)
        clip = self._kept.get(key)
        if clip is None:
            clip = self._reader.read_task(task, plan)
            self._kept.put(key, clip, clip.nbytes)
        return clip

    def close(self) -> None:
        """End the decode process, and a read under way with ReaderClosedError."""
        self._reader.close()


class ClipFeatures:
    """Encodes clips at the boundary and keeps the last ones. `clips_encoded` counts those that were not kept."""

    def __init__(
        self,
        backbone: Backbone,
        boundary: Boundary,
        budget_bytes: int,
        put: Callable[[np.ndarray], Any],
        get: Callable[[Any], np.ndarray],
        meter: Meter,
    ) -> None:
        """put: stores an array and returns a reference to ship; get: resolves one."""
        self._backbone, self._boundary, self._put, self._get, self._meter = backbone, boundary, put, get, meter
        self._kept: ByteBudgetCache[Encoded] = ByteBudgetCache(budget_bytes)
        self.clips_encoded = 0

    def given(self, reference: Any) -> Encoded:
        """Return a clip that another worker has encoded."""
        return Encoded(to_tensor(self._get(reference)).to(self._backbone.device), reference)

    @torch.no_grad()
    def encode(self, task: StreamTask, turns: int, clip: Clip) -> Encoded:
        """Return the clip at the boundary, kept or encoded now."""
        key = clip_key(task, turns)
        kept = self._kept.get(key)
        if kept is None:
            with self._meter.phase("encode"):
                encoded = self._backbone.encoding(clip.frames, pre_merger=self._boundary.worker_merges).finish()
            self.clips_encoded += 1
            # A training tower's output is of no use to the learner: it ships nothing, and frames go instead.
            kept = Encoded(encoded, None if self._boundary.learner_runs_tower else self._put(to_array(encoded)))
            self._kept.put(key, kept, encoded.nbytes)
        return kept

    @torch.no_grad()
    def embed(self, encoded: Encoded) -> torch.Tensor:
        """Return what streams embed, [chunks, tokens, F].

        With freeze=tower the mergers run for every group, and what they make lives as long as the group: they train.
        """
        return self._backbone.merge([encoded.tensor])[0] if self._boundary.worker_merges else encoded.tensor

    def clear(self) -> None:
        """Forget every encoded clip: the weights that made them have changed."""
        self._kept.clear()

"""The forward of one micro-batch inside DeepSpeed: log-probs under the policy.

Invariants:
- On every rank it calls the tower, the mergers and the head exactly as often as the `MicroBatchWork` says.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from learner.batching import MicroBatch, MicroBatchWork
from learner.config import LearnerConfig
from streams.backbone.backbone import Backbone, to_array, to_tensor
from streams.backbone.kernel_choice import choose_learner_attention
from streams.scoring.logprobs import score_rows

Media = list[tuple[str, np.ndarray]]


def encode_media(backbone: Backbone, media: Media) -> list[torch.Tensor]:
    """Return the features [chunks, tokens, F] of every clip, with gradient where vision parameters train.

    Features are used as shipped, pre-merger rows pass through the mergers, frames through tower and mergers. Each of
    these modules is called at most once.
    """
    frames = [array for kind, array in media if kind == "frames"]
    rows = [to_tensor(array).to(backbone.device) for kind, array in media if kind == "pre_merger"]
    made = {
        "frames": iter(backbone.encode_video(frames) if frames else []),
        "pre_merger": iter(backbone.merge(rows) if rows else []),
    }
    return [next(made[kind]) if kind in made else to_tensor(array).to(backbone.device) for kind, array in media]


def batch_features(backbone: Backbone, batch: MicroBatch) -> torch.Tensor | None:
    """Return the features [video tokens, F] of the batch, log by log; None if it shows no clip."""
    encoded = encode_media(backbone, batch.media)
    return torch.cat([encoded[i].flatten(0, 1) for i in batch.order]) if batch.order else None


def blank_media(backbone: Backbone) -> dict[str, np.ndarray]:
    """Return the smallest media that vision modules accept, one token each, by kind; the kind with most work first."""
    image = backbone.image
    side = image.patch_size * image.merge_size
    return {
        "frames": np.zeros((1, image.temporal_patch_size, side, side, 3), np.uint8),
        "pre_merger": to_array(torch.zeros((1, 1, backbone.pre_merger_width), dtype=backbone.dtype)),
    }


class PolicyForward(nn.Module):
    """The scoring function as the module that DeepSpeed wraps; its parameters are the backbone's."""

    def __init__(self, backbone: Backbone, config: LearnerConfig) -> None:
        super().__init__()
        self.model = backbone.model
        # In a list, so that torch cannot find modules in it and register them a second time.
        self._backbone = [backbone]
        self._config = config

    def forward(
        self, batch: MicroBatch, work: MicroBatchWork, temperature: float, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return (log-probs [N], entropies [N]) of the batch's targets and the features of its video tokens.

        Features are for the reference. Only the log-probs may require a gradient, and with `entropy_gradient` the entropies:
        DeepSpeed counts the outputs that do, and the count must be the same on every rank.
        """
        backbone = self._backbone[0]
        features = batch_features(backbone, batch)
        scores = score_rows(
            backbone,
            batch.rows,
            features,
            temperature=temperature,
            head_chunk=self._config.head_chunk,
            head_vocab=self._config.head_vocab,
            head_chunks=work.head_chunks,
            attention=choose_learner_attention(self._config.attention, backbone.device.type).name,
            entropy_gradient=entropy_gradient,
        )
        return scores.logp, scores.entropy, None if features is None else features.detach()

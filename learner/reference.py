"""The frozen policy that the KL term compares with.

Invariants:
- It is a plain copy that no optimiser and no checkpoint ever touches.
- It is scored under the policy's mask, ban list and temperature.
"""

from __future__ import annotations

from pathlib import Path

import torch

from learner.batching import MicroBatch
from learner.config import LearnerConfig
from learner.forward import batch_features
from streams.backbone.backbone import Backbone
from streams.backbone.boundary import Boundary
from streams.backbone.kernel_choice import choose_learner_attention
from streams.layout.layout import LayoutConfig
from streams.scoring.logprobs import Scores, score_rows


def _check_shared_vision(reference: Backbone, policy: Backbone, boundary: Boundary, checkpoint: str) -> None:
    """The reference is handed what the policy's frozen part makes of a clip: its own must make the same. Raises ValueError."""
    theirs = dict(reference.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        if not boundary.below(name):
            continue
        if name not in theirs or not torch.equal(theirs[name].to(parameter.device), parameter):
            raise ValueError(
                f"algorithm.reference={checkpoint}: its {name} is not that of the trained checkpoint {policy.source}, but "
                f"with learner.freeze={boundary} it is scored on what that one's vision side makes of the frames: set "
                "learner.freeze=none, or name a reference with the same vision weights"
            )


class Reference:
    """A frozen copy of the checkpoint that RL started from.

    Memory on every rank: its parameters once, in the learner's dtype, whole at every ZeRO stage (a 3B model in bfloat16:
    about 7.5 GB); without what the policy freezes of its vision side (the tower, or the mergers, too), as both then see
    the same there.
    """

    def __init__(
        self, checkpoint: str, layout: LayoutConfig, config: LearnerConfig, device: str, policy: Backbone
    ) -> None:
        self._backbone = Backbone.load(
            Path(checkpoint),
            layout,
            dtype=getattr(torch, config.dtype),
            device=device,
            vision_attention=policy.vision_attention,
        )
        if self._backbone.layout.banned != policy.layout.banned:
            raise ValueError(
                f"algorithm.reference={checkpoint}: its vocabulary or ban list is not that of the trained checkpoint "
                f"{policy.source}: their log-probs cannot be compared; name the checkpoint that RL starts from"
            )
        _check_shared_vision(self._backbone, policy, config.boundary, checkpoint)
        self._backbone.model.requires_grad_(False)
        self._config = config
        self._own_vision = config.boundary.vision_trains
        if not self._own_vision:
            self._backbone.model.model.visual = None
        elif not config.boundary.learner_runs_tower:
            visual = self._backbone.model.model.visual
            visual.patch_embed = visual.blocks = None

    @torch.no_grad()
    def logp(self, batch: MicroBatch, features: torch.Tensor | None, temperature: float) -> torch.Tensor:
        """Log-probs [N] of the batch's targets. features: the policy's, used if both share all of the vision side."""
        if self._own_vision:
            features = batch_features(self._backbone, batch)
        scores: Scores = score_rows(
            self._backbone,
            batch.rows,
            features,
            temperature=temperature,
            head_chunk=self._config.head_chunk,
            attention=choose_learner_attention(self._config.attention, self._backbone.device.type).name,
        )
        return scores.logp

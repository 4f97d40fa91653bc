"""The frozen reference policy of the KL term.

Invariants:
- It is a plain copy that is neither trained nor saved.
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
    """Raise ValueError unless both models have the same frozen vision weights.

    The reference is given the output of the policy's frozen vision modules, so its own must compute the same.
    """
    theirs = dict(reference.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        if not boundary.below(name):
            continue
        if name not in theirs or not torch.equal(theirs[name].to(parameter.device), parameter):
            raise ValueError(
                f"algorithm.reference={checkpoint}: its {name} is not that of the trained checkpoint {policy.source}, but "
                f"with learner.freeze={boundary} the reference is scored on that checkpoint's vision features: set "
                "learner.freeze=none, or name a reference with the same vision weights"
            )


class Reference:
    """A frozen copy of the checkpoint that RL started from.

    Its parameters are on every rank once, in the learner's dtype and unpartitioned at every ZeRO stage: about 7.5 GB
    for a 3B model in bfloat16. Vision modules that the policy freezes are not kept, since both models share their
    output.
    """

    def __init__(
        self, checkpoint: str, layout: LayoutConfig, config: LearnerConfig, device: str, policy: Backbone
    ) -> None:
        """Load the checkpoint. Raises ValueError if its vocabulary, or its frozen vision side, is not the policy's."""
        self._backbone = Backbone.load(
            Path(checkpoint),
            layout,
            dtype=getattr(torch, config.dtype),
            device=device,
            vision_attention=policy.vision_attention,
            fused_kernels=policy.fused_kernels,
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
        # After the comparison above the frozen modules are duplicates: drop them to free their memory.
        if not self._own_vision:
            self._backbone.model.model.visual = None
        elif not config.boundary.learner_runs_tower:
            visual = self._backbone.model.model.visual
            visual.patch_embed = visual.blocks = None

    @torch.no_grad()
    def logp(self, batch: MicroBatch, features: torch.Tensor | None, temperature: float) -> torch.Tensor:
        """Return the log-probs [N] of the batch's targets.

        features: the policy's features of the batch's video tokens, used if the whole vision side is frozen.
        """
        if self._own_vision:
            features = batch_features(self._backbone, batch)
        scores: Scores = score_rows(
            self._backbone,
            batch.rows,
            features,
            temperature=temperature,
            head_chunk=self._config.head_chunk,
            head_vocab=self._config.head_vocab,
            attention=choose_learner_attention(self._config.attention, self._backbone.device.type).name,
        )
        return scores.logp

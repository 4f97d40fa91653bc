"""The model's forward over one packed row.

Invariant: keys and values of the row are in the pool when it returns, each layer's before that layer attends.
"""

from __future__ import annotations

import numpy as np
import torch

from streams.backbone.backbone import Backbone, VideoTokens
from tests.support.one_step.kv_pool import KVPool
from tests.support.one_step.step_plan import StepPlan
from tests.support.one_step.torch_sdpa import TorchBackend


def forward(step: StepPlan, backbone: Backbone, backend: TorchBackend, pool: KVPool) -> torch.Tensor:
    """Return the row's hidden states [rows, hidden], in the backbone's dtype and on its device."""
    device = backbone.device
    ids = torch.from_numpy(np.concatenate(step.ids)).to(device)
    positions = torch.from_numpy(np.concatenate(step.positions, axis=1).astype(np.int64)).to(device)
    video = None
    if step.features:
        video = VideoTokens(torch.from_numpy(np.concatenate(step.video)).to(device), torch.cat(step.features))
    new_slots = np.concatenate(step.new_slots)
    attention = backend.plan(new_slots, step.segments)
    # Around the backend's plan and not in it: only this way both kinds of positions can share a row.
    plan = step.rotation.plan(attention, pool, new_slots, backbone)
    return backbone.hidden(ids[None], positions[:, None], plan, video)[0]

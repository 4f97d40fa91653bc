"""Ready-made answers in place of the model and the draw: what is left of the engine's time is the host's.

Works for the engine and for the one-step engine of the tests. The answers are constants of the right shape: hidden states and
logits of zeros, and as the drawn id one word, so that forced tokens end thoughts and turns.

Invariants: the model's forward, its logits and the draw are never computed inside the context, and are back after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from rollout.decode import sampler
from streams.backbone.backbone import Backbone
from tests.support.one_step import choose as one_step_choose

LOGP = -1.0


@contextmanager
def ready_made(backbone: Backbone, word: int) -> Iterator[None]:
    """Within the context, every forward, every row of logits and every draw (always `word`) is there already."""
    text = backbone.model.config.text_config
    device = backbone.device
    zero = torch.zeros((1, 1, 1), dtype=backbone.dtype, device=device)
    row = torch.zeros((1, 1), dtype=torch.float32, device=device)

    def hidden(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return zero.expand(*ids.shape, int(text.hidden_size))

    def logits(given: torch.Tensor, _: float) -> torch.Tensor:
        return row.expand(len(given), backbone.layout.vocab_rows)

    def pick(given: torch.Tensor, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(given), word), np.full(len(given), LOGP)

    def draw(given: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(given)
        return torch.full((n,), word, device=device), torch.full((n,), LOGP, dtype=torch.float64, device=device)

    with ExitStack() as patches:
        for owner, name, answer in (
            (backbone, "hidden", hidden),
            (backbone, "logits", logits),
            (one_step_choose, "pick", pick),
            (sampler, "draw", draw),
        ):
            patches.enter_context(mock.patch.object(owner, name, answer))
        yield

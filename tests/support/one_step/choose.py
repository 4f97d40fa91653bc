"""The next token of every stream that has a choice: sampled, and logged with its log-prob and weight version.

Invariant: a token depends on its stream's seed, its index in the log and its logits, and on nothing else in the row.
"""

from __future__ import annotations

import numpy as np
import torch

from streams.backbone.backbone import Backbone
from tests.support.one_step.request import Stream
from tests.support.one_step.sampler import pick


def choose(choosing: list[tuple[Stream, int]], hidden: torch.Tensor, backbone: Backbone, version: int) -> None:
    """Sample and log one token per pair of a stream and its index in the row's hidden states [rows, hidden]."""
    rows = torch.tensor([row for _, row in choosing], device=hidden.device)
    headers = [stream.request.header for stream, _ in choosing]
    scale = torch.tensor([h.score_temperature for h in headers], dtype=torch.float64, device=hidden.device)
    # One matrix product for all, then each row by its own temperature: the learner scores with the same division.
    logits = backbone.logits(hidden[rows], 1.0)
    logits = logits / scale.to(logits.dtype)[:, None]
    ids, logps = pick(
        logits,
        np.array([h.temperature == 0 for h in headers]),
        np.array([h.seed for h in headers], np.uint64),
        np.array([stream.writer.log.length for stream, _ in choosing], np.uint64),
    )
    for (stream, _), token, logp in zip(choosing, ids, logps, strict=True):
        stream.writer.append_generated(int(token), version, logp=float(logp), sampled=True, target=True)

"""Log-probs at target positions: one forward over packed rows, then a chunked LM head.

Invariants:
* logits exist only at target positions, for `head_chunk` of them and `head_vocab` ids at a time;
* the ban list and the score temperature are applied before log-softmax, as in the engine;
* the predictor of a target is the log entry just before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from streams.backbone.attention import AttentionPlan
from streams.backbone.backbone import Backbone, VideoTokens
from streams.backbone.kernel_choice import HEAD_VOCAB
from streams.log.record import StreamLog
from streams.scoring.block_mask import BLOCK
from streams.scoring.contiguous import region_plan
from streams.scoring.flex_kernels import Heads, flex_options
from streams.scoring.mask import MIN_FLEX_TOKENS, DensePlan, FlexPlan, block_mask, dense_mask
from streams.scoring.packing import Rows, pack, plan_micro_batches


@dataclass(frozen=True)
class Scores:
    """Log-prob and entropy over allowed ids, float [N] in nats, of the N targets of a Rows."""

    logp: torch.Tensor
    entropy: torch.Tensor


def attention_plan(rows: Rows, kind: str, backbone: Backbone) -> AttentionPlan:
    """Return the plan, `sdpa` (dense mask) or `flex` (block mask), on the model's device; the rows may be on the host."""
    device = backbone.device
    if rows.regions is not None:
        return region_plan(rows, rows.regions, backbone, kind)
    if kind == "flex":
        options = flex_options(Heads.of(backbone, lse=False))
        if options is not None:
            return FlexPlan(block_mask(rows.expiry, rows.lane, device), options)
    return DensePlan(dense_mask(rows.expiry.to(device), rows.lane.to(device)))


def score_rows(
    backbone: Backbone,
    rows: Rows,
    features: torch.Tensor | None,
    *,
    temperature: float = 1.0,
    head_chunk: int = 1024,
    head_chunks: int = 0,
    head_vocab: int = HEAD_VOCAB,
    attention: str = "sdpa",
    entropy_gradient: bool = False,
) -> Scores:
    """Return the scores of the rows' targets. Gradients flow into the backbone and `features` where they require them.

    entropy_gradient: entropies have one, too, as log-probs always have.

    features: float [M, F] of the video tokens, log by log.
    head_chunks: least number of calls of the head, on no targets if need be: ranks that share a model's parameters must
    call it equally often.
    """
    if attention == "flex":
        rows = rows.padded(BLOCK, at_least=MIN_FLEX_TOKENS)
    plan = attention_plan(rows, attention, backbone)
    rows = rows.to(backbone.device)
    video = None
    if len(rows.video_index):
        if features is None:
            raise ValueError(f"{len(rows.video_index)} video tokens but 0 features: media and log do not match")
        video = VideoTokens(rows.video_index, features)
    hidden = backbone.hidden(rows.ids, rows.positions, plan, video)
    at_predictors = hidden.flatten(0, 1)[rows.predictor]

    logps, entropies = [], []
    chunks = max(-(-rows.num_targets // head_chunk), head_chunks)
    for start in range(0, chunks * head_chunk, head_chunk):
        states = at_predictors[start : start + head_chunk]
        targets = rows.target_ids[start : start + head_chunk]
        logp, entropy = backbone.score(
            states, targets, temperature, block=head_vocab, entropy_gradient=entropy_gradient
        )
        logps.append(logp)
        entropies.append(entropy)
    if not logps:
        empty = at_predictors.new_zeros(0)
        return Scores(empty, empty)
    return Scores(torch.cat(logps), torch.cat(entropies))


@torch.no_grad()
def behaviour_differences(
    backbone: Backbone,
    logs: list[StreamLog],
    features: list[torch.Tensor],
    *,
    row_tokens: int = 2048,
    max_tokens: int = 16384,
    head_chunk: int = 1024,
    attention: str = "sdpa",
) -> list[np.ndarray]:
    """Return re-scored minus behaviour log-prob of every sampled token, one float64 array per log.

    features: per log [video tokens, F], as they were embedded. All logs must share one score temperature.
    """
    temperatures = {log.header.score_temperature for log in logs}
    if len(temperatures) > 1:
        raise ValueError(f"logs of several score temperatures in one call: {sorted(temperatures)}")
    out: list[np.ndarray] = [np.zeros(0)] * len(logs)
    for batch in plan_micro_batches([len(log) for log in logs], row_tokens, max_tokens):
        members = sorted(i for row in batch for i in row)
        rows = pack(logs, batch, which="sampled")
        scores = score_rows(
            backbone,
            rows,
            torch.cat([features[i] for i in members]) if members else None,
            temperature=logs[members[0]].header.score_temperature,
            head_chunk=head_chunk,
            attention=attention,
        )
        logp = scores.logp.double().cpu().numpy()
        stream, index = rows.stream.numpy(), rows.target_index.numpy()
        for i in members:
            mine = stream == i
            out[i] = logp[mine] - logs[i].behaviour_logp[index[mine]]
    return out

"""The LM head at target positions: log-prob and entropy over a vocabulary that is gone through block by block.

Invariants:
* logits exist for one block of ids at a time, in the forward and in the backward, which computes them again;
* ids that are banned have probability 0 and no gradient; logits are divided by the temperature before anything else;
* each logit is rounded as the engine's, whatever the block: only the order of sums depends on it;
* the weight is used inside its module's call, where ZeRO-3 gathers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from streams.backbone.kernel_choice import HEAD_VOCAB


@dataclass(frozen=True)
class Asked:
    """What a head is asked for, instead of logits.

    Attributes:
        targets: int64 [N], an id for each of the N hidden states.
        banned: int64 [K] on the host, ids that have probability 0.
        temperature: what logits are divided by.
        block: ids whose logits exist at once.
        entropy_gradient: entropies have a gradient, too, as log-probs have.
    """

    targets: torch.Tensor
    banned: torch.Tensor
    temperature: float
    block: int = HEAD_VOCAB
    entropy_gradient: bool = False


def let_score(head: nn.Linear) -> None:
    """Let an LM head be called with what is asked for: `head(hidden, Asked(...))` -> (log-probs [N], entropies [N])."""
    head.forward = partial(_forward, head)  # type: ignore[method-assign]


def _forward(head: nn.Linear, hidden: torch.Tensor, asked: Asked | None = None) -> Any:
    if asked is None:
        return type(head).forward(head, hidden)
    return _Scores.apply(hidden, head.weight, asked)


class _Scores(torch.autograd.Function):
    """Log-probs and entropies, float32 or float64 [N], of hidden states [N, H] under a head's weight [V, H].

    Sums are online (Milakov and Gimelshein, arXiv 1805.02867): relative to the largest logit so far, scaled when it grows.
    With z = sum exp(x - m) and e = sum exp(x - m) (x - m): the log of the sum of exponentials is m + log z, the entropy
    log z - e / z.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, asked: Asked
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = hidden.new_zeros(len(hidden), dtype=wide)
        # Finite, so that a block whose ids are all banned leaves no NaN.
        largest = torch.full_like(rows, torch.finfo(wide).min)
        z, e, at_target = rows.clone(), rows.clone(), rows.clone()
        for block in _blocks(hidden, weight, asked):
            x = block.logits
            at_target += block.of_targets(x)
            before, largest = largest, torch.maximum(largest, x.amax(-1))
            shrunk = (before - largest).exp_()
            # What was summed relative to the old maximum, relative to the new one.
            e = shrunk * (e + z * (before - largest).clamp_(min=-BEYOND))
            z = shrunk * z
            x -= largest[:, None]
            p = x.exp()
            z += p.sum(-1)
            # A banned id's share is 0 and not 0 times infinity.
            e += p.mul_(x.clamp_(min=-BEYOND)).sum(-1)
            # The next block's logits are made beside nothing of this one's.
            del block, x, p
        log_z = z.log()
        sums = largest + log_z
        entropy = log_z - e / z
        ctx.save_for_backward(hidden, weight, sums, entropy)
        ctx.asked = asked
        if not asked.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return at_target - sums, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, of_logp: torch.Tensor, of_entropy: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, sums, entropy = ctx.saved_tensors  # type: ignore[attr-defined]
        asked: Asked = ctx.asked  # type: ignore[attr-defined]
        wants_hidden, wants_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        to_hidden = torch.zeros_like(hidden, dtype=sums.dtype) if wants_hidden else None
        to_weight = torch.empty_like(weight) if wants_weight else None
        for block in _blocks(hidden, weight, asked):
            log_p = block.logits.sub_(sums[:, None])
            p = log_p.exp()
            if asked.entropy_gradient:
                # d entropy / d x = -p (log p + entropy)
                log_p.clamp_(min=-BEYOND).add_(entropy[:, None]).mul_(of_entropy[:, None]).add_(of_logp[:, None])
                gradient = p.mul_(log_p).neg_()
            else:
                gradient = p.mul_(-of_logp[:, None])
            block.add_to_targets(gradient, of_logp)
            narrow = gradient.div_(block.scale).to(hidden.dtype)
            if to_hidden is not None:
                to_hidden += narrow @ weight[block.ids]
            if to_weight is not None:
                to_weight[block.ids] = narrow.t() @ hidden
            del block, log_p, p, gradient, narrow
        return None if to_hidden is None else to_hidden.to(hidden.dtype), to_weight, None


BEYOND = 1e4
"""What a log-prob of probability 0 counts as where it is multiplied by that 0."""


@dataclass
class _Block:
    """Ids `ids` of the vocabulary. logits: [N, block], in float32 at least, scaled, banned ones at -inf."""

    ids: slice
    logits: torch.Tensor
    banned: torch.Tensor
    scale: torch.Tensor
    targets: torch.Tensor

    def _inside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(column of each target, or any; whether it is in this block), both [N, 1]: without a look from the host."""
        column = self.targets[:, None] - self.ids.start
        inside = (column >= 0) & (column < self.logits.shape[1])
        return column.clamp(0, self.logits.shape[1] - 1), inside

    def of_targets(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values [N, block] at the targets that are in this block, [N]; 0 for the others."""
        column, inside = self._inside()
        found = values.gather(1, column)
        return torch.where(inside, found, torch.zeros_like(found))[:, 0]

    def add_to_targets(self, gradient: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [N] to a gradient [N, block] at the targets that are in this block. Banned ids have none."""
        column, inside = self._inside()
        added = torch.where(inside, values[:, None], torch.zeros_like(values[:, None]))
        gradient.scatter_add_(1, column, added).index_fill_(1, self.banned, 0.0)


def _blocks(hidden: torch.Tensor, weight: torch.Tensor, asked: Asked) -> Iterator[_Block]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # A tensor: a GPU would multiply by the reciprocal of a number.
    scale = torch.full((1,), asked.temperature, dtype=wide, device=hidden.device)
    for first in range(0, len(weight), asked.block):
        ids = slice(first, min(first + asked.block, len(weight)))
        banned = asked.banned[(asked.banned >= ids.start) & (asked.banned < ids.stop)] - first
        banned = banned.to(hidden.device)
        logits = (hidden @ weight[ids].t()) / scale
        yield _Block(ids, logits.index_fill_(1, banned, float("-inf")), banned, scale, asked.targets)
        del logits

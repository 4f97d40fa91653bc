"""Sampler: one uniform number per (stream seed, token index) and our own inverse CDF.

Invariant: a draw depends on the stream's seed, the token's index in its log and its logits, never on the row of the batch
or on what else runs.
"""

from __future__ import annotations

import numpy as np
import torch

_MASK64 = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, 'Fast splittable pseudorandom number generators')."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & _MASK64
        x = ((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)) & _MASK64
        x = ((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)) & _MASK64
        return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return float64 [n] in [0, 1) for seeds uint64 [n] and token indices [n]."""
    return (_mix(_mix(seeds.astype(np.uint64)) ^ indices.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53


def pick(
    logits: torch.Tensor, greedy: np.ndarray, seeds: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one id per row of logits [n, V] (temperature and ban list already applied).

    Returns (ids int64 [n], log-probs float64 [n]). Rows with `greedy` take the largest logit (the first of equals).
    """
    logp = torch.log_softmax(logits, dim=-1)
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    rows = torch.from_numpy(greedy).to(logits.device)
    if greedy.any():
        ids[rows] = logits[rows].argmax(dim=-1)
    if not greedy.all():
        cdf = logp[~rows].double().exp().cumsum(dim=-1)
        draw = torch.from_numpy(uniforms(seeds[~greedy], indices[~greedy])).to(logits.device)
        # The sum is 1 only up to rounding: scaling the draw keeps it below the last allowed id's edge.
        ids[~rows] = torch.searchsorted(cdf, (draw * cdf[:, -1])[:, None], right=True)[:, 0]
    chosen = logp.gather(-1, ids[:, None])[:, 0]
    return ids.cpu().numpy(), chosen.double().cpu().numpy()

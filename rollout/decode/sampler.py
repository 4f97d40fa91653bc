"""Sampler: one uniform number per (stream seed, token index) and our own inverse CDF, on the device of the logits.

Invariants:
* a draw depends on the stream's seed, the token's index in its log and its logits, never on the row of the batch or on what
  else runs;
* nothing is read back to the host.
"""

from __future__ import annotations

import hashlib

import torch


def _signed(value: int) -> int:
    """Return the int64 with the bits of a uint64."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift int64 right as if it were unsigned: torch repeats the sign bit, and lacks the operation for uint64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, 'Fast splittable pseudorandom number generators')."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniforms(seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return float64 [n] in [0, 1) for the bits of seeds and indices, int64 [n]."""
    return _shifted(_mix(_mix(seeds) ^ indices), 11).double() * 2.0**-53


def stream_seed(run_seed: int, stream_id: str) -> int:
    """Derive a stream's seed from the run's seed and the stream's identity (epoch, task, stream)."""
    digest = hashlib.blake2b(f"{run_seed}:{stream_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(
    logits: torch.Tensor,
    greedy: torch.Tensor | bool,
    seeds: torch.Tensor,
    indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one id per row of logits [n, V], banned ids at -inf and divided by the row's temperature.

    Returns (ids int64 [n], log-probs float64 [n]).

    Args:
        greedy: bool [n], rows that take the largest logit (the first of equals); one bool says it for all of them.
        seeds, indices: int64 [n].
    """
    logp = torch.log_softmax(logits, dim=-1)
    if greedy is True:
        ids = logits.argmax(dim=-1)
    else:
        # In float64, so a copy also of what is kept: the next two steps need none of their own.
        cdf = logp.to(torch.float64, copy=True).exp_().cumsum_(dim=-1)
        # The sum is 1 only up to rounding: scaling the draw keeps it below the last allowed id's edge.
        aim = uniforms(seeds, indices) * cdf[:, -1]
        ids = torch.searchsorted(cdf, aim[:, None], right=True)[:, 0]
        if greedy is not False:
            ids = torch.where(greedy, logits.argmax(dim=-1), ids)
    return ids, logp.gather(-1, ids[:, None])[:, 0].double()

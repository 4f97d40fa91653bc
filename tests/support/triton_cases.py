"""The decode kernel against one softmax per row in float64, in Triton's interpreter; prints a line of JSON per case.

    TRITON_INTERPRET=1 python -m tests.support.triton_cases

A process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import json
from itertools import product

import torch

from rollout.attention import make_backend, triton_kernel
from rollout.attention.triton_decode import TritonDecodeBackend
from rollout.engine.kv_pool import KVPool

# Small pieces, so that short rows have all kinds of them: one, some, all; the last one full, or not.
triton_kernel.SPLITS, triton_kernel.SPLIT_KEYS, triton_kernel.BLOCK_KEYS = 4, 32, 16

SLOTS, SEATS, WIDTH = 211, 7, 203
LENGTHS = (1, 15, 17, 129, 203)
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((6, 2, 8), (16, 2, 128), (4, 4, 80), (2, 1, 64))
"""Query heads, KV heads, head dimension."""


def plain(pool: KVPool, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """One query [H, D] over its slots in layer 1 -> float64 [H, D]."""
    k, v = (t[slots].double() for t in (pool.keys(1), pool.values(1)))
    k, v = (t.repeat_interleave(len(q) // t.shape[1], dim=1) for t in (k, v))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q.double(), k) * q.shape[1] ** -0.5, dim=-1)
    return torch.einsum("hn,nhd->hd", weights, v)


def case(dtype: torch.dtype, shape: tuple[int, int, int], paged: bool) -> dict[str, object]:
    """Rows of several lengths, one of them a seat that idles on the trash slot; others' slots and NaN behind their ends."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(heads + dim)
    pool = KVPool(SLOTS, 2, kv_heads, dim, dtype=dtype, paged=paged)
    pool.kv.copy_(torch.randn(pool.kv.shape, generator=generator))
    nowhere = SLOTS - 1
    pool.keys(1)[nowhere], pool.values(1)[nowhere] = torch.nan, torch.nan
    table = torch.full((SEATS, WIDTH), nowhere)
    seats = torch.randperm(SEATS, generator=generator)[: len(LENGTHS) + 1]
    lengths = torch.tensor([*LENGTHS, 1])
    for seat, length in zip(seats, lengths, strict=True):
        table[seat, :length] = torch.randperm(nowhere, generator=generator)[:length]
    table[seats[-1]] = pool.trash
    q = torch.randn(len(lengths), heads, dim, generator=generator).to(dtype).transpose(0, 1)
    groups = heads // kv_heads
    # Decoding asks nothing of the backend for prefill.
    backend = TritonDecodeBackend(pool, None if paged else make_backend("torch", pool, groups), groups)
    scaling = dim**-0.5
    out = backend.decode(table, seats, lengths)(1, q, scaling)
    wanted = [plain(pool, q[:, i], table[seats[i], : lengths[i]]) for i in range(len(lengths))]
    # A key too few must be seen.
    short = backend.decode(table, seats, (lengths - 1).clamp(min=1))(1, q, scaling)
    alone = backend.decode(table, seats[2:3], lengths[2:3])(1, q[:, 2:3], scaling)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": max(float((out[i].double() - wanted[i]).abs().max()) for i in range(len(lengths))),
        "error_with_a_key_less": float((short[1].double() - wanted[1]).abs().max()),
        "alone_is_equal": bool(torch.equal(alone[0], out[2])),
        "out_dtype": out.dtype == dtype,
    }


if __name__ == "__main__":
    for dtype, shape, paged in product(TYPES, SHAPES, (True, False)):
        # The interpreter takes its time: every type, layout and shape, and not all of their combinations.
        if shape == SHAPES[0] or (paged and dtype in (torch.float64, torch.bfloat16)):
            print(json.dumps(case(dtype, shape, paged)), flush=True)

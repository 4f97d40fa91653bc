"""One query per stream over its slots of the pool, in Triton: split over the keys, then combined.

    split     program (row, KV head, split): softmax and sum over one piece of the row's keys, all query heads of that KV head
    combine   program (row, query head): the pieces by their share of the row's softmax

The two passes are those of Flash-Decoding (Dao, Haziza, Massa, Sizov 2023); slots are looked up in the table, key by key.

Invariants:
* no shape, no grid and no argument depends on a length: lengths are read on the device only, so a launch can be captured;
* how a row's keys are split depends on its own length and on nothing else: what a row gets does not depend on the batch;
* products are summed in fp32, for float64 in float64; fp32 products are not rounded to TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLITS = 32
"""Pieces of a long row: two KV heads and one row then fill half of an H100's multiprocessors."""
SPLIT_KEYS = 128
"""Least keys of a piece: below, writing and reading its partial result costs more than it saves."""
BLOCK_KEYS = 64
"""Keys that a program holds at once; SPLIT_KEYS is a multiple of it."""
LEAST_DOT = 16
"""Least side of a block that `tl.dot` takes."""
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _split_keys(length, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Keys of each piece of a row: a multiple of BLOCK_KEYS."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_KEYS) * BLOCK_KEYS, SPLIT_KEYS)


@triton.jit
def _split(
    q,
    k,
    v,
    table,
    seats,
    lengths,
    sums,
    logs,
    q_head,
    q_row,
    k_slot,
    k_head,
    table_seat,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Write a piece's weighted values, divided by its sum of weights, and the logarithm of that sum."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    keys = _split_keys(length, SPLITS, SPLIT_KEYS, BLOCK_KEYS)
    first = split * keys
    stop = tl.minimum(first + keys, length)
    if first < stop:
        slots_of_row = table + tl.load(seats + row) * table_seat
        group = tl.arange(0, BLOCK_GROUPS)
        dim = tl.arange(0, BLOCK_DIM)
        query = head * GROUPS + group
        own = (group < GROUPS)[:, None] & (dim < DIM)[None, :]
        queries = tl.load(q + query[:, None] * q_head + row * q_row + dim[None, :], mask=own, other=0.0).to(FACTOR)
        acc = sums.dtype.element_ty
        total = tl.zeros([BLOCK_GROUPS, BLOCK_DIM], acc)
        weight = tl.zeros([BLOCK_GROUPS], acc)
        largest = tl.full([BLOCK_GROUPS], float("-inf"), acc)
        for at in range(first, stop, BLOCK_KEYS):
            key = at + tl.arange(0, BLOCK_KEYS)
            seen = key < stop
            slot = tl.load(slots_of_row + key, mask=seen, other=0)
            where = slot[:, None] * k_slot + head * k_head + dim[None, :]
            inside = seen[:, None] & (dim < DIM)[None, :]
            block = tl.load(k + where, mask=inside, other=0.0)
            scores = tl.dot(queries, tl.trans(block).to(FACTOR), input_precision="ieee", out_dtype=acc) * SCALE
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # The first key of a block is seen, so no row of scores is all -inf.
            higher = tl.maximum(largest, tl.max(scores, 1))
            shrink = tl.exp(largest - higher)
            shares = tl.exp(scores - higher[:, None])
            block = tl.load(v + where, mask=inside, other=0.0)
            rounded = shares.to(block.dtype).to(FACTOR)
            total = total * shrink[:, None] + tl.dot(rounded, block.to(FACTOR), input_precision="ieee", out_dtype=acc)
            weight = weight * shrink + tl.sum(shares, 1)
            largest = higher
        out = (row * tl.num_programs(1) * GROUPS + query) * SPLITS + split
        tl.store(sums + out[:, None] * DIM + dim[None, :], total / weight[:, None], mask=own)
        tl.store(logs + out, largest + tl.log(weight), mask=group < GROUPS)


@triton.jit
def _combine(
    sums,
    logs,
    lengths,
    out,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    pieces = tl.cdiv(length, _split_keys(length, SPLITS, SPLIT_KEYS, BLOCK_KEYS))
    at = row * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_DIM)
    log = tl.load(logs + at * SPLITS + split, mask=split < pieces, other=float("-inf"))
    shares = tl.exp(log - tl.max(log, 0))
    shares = shares / tl.sum(shares, 0)
    inside = (split < pieces)[:, None] & (dim < DIM)[None, :]
    parts = tl.load(sums + (at * SPLITS + split)[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    mixed = tl.sum(parts * shares[:, None], 0)
    tl.store(out + at * DIM + dim, mixed.to(out.dtype.element_ty), mask=dim < DIM)


def block_sizes(dim: int, itemsize: int) -> dict[str, int]:
    """Return the sizes that both kernels are compiled with, for heads of dim values of itemsize bytes."""
    block_dim = max(triton.next_power_of_2(dim), LEAST_DOT)
    # Wide blocks of wide numbers do not fit into shared memory.
    block_keys = BLOCK_KEYS if itemsize * block_dim <= 512 else LEAST_DOT
    sizes = {"DIM": dim, "BLOCK_DIM": block_dim}
    return sizes | {"SPLITS": SPLITS, "SPLIT_KEYS": SPLIT_KEYS, "BLOCK_KEYS": block_keys}


@torch.library.custom_op(
    "sightline::decode_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor table, Tensor seats, Tensor lengths, float scaling) -> Tensor",
)
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    seats: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attend with one query per row; [N, H, D] in q's dtype.

    Args:
        q: [H, N, D].
        k, v: [slots, KV heads, D], views of one storage with the same strides; H is a multiple of KV heads.
        table: int64 [seats, width], slots of each seat, of which row i sees the first `lengths[i]` >= 1 of seat `seats[i]`.
        seats, lengths: int64 [N].
        scaling: what scores are multiplied by.
    """
    heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    assert k.stride() == v.stride()
    assert q.stride(2) == k.stride(2) == table.stride(1) == seats.stride(0) == lengths.stride(0) == 1
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = torch.empty((rows, heads, SPLITS, dim), dtype=wide, device=q.device)
    logs = torch.empty((rows, heads, SPLITS), dtype=wide, device=q.device)
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    sizes = block_sizes(dim, q.itemsize)
    _split[rows, kv_heads, SPLITS](
        q,
        k,
        v,
        table,
        seats,
        lengths,
        sums,
        logs,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        table.stride(0),
        SCALE=scaling,
        GROUPS=heads // kv_heads,
        # Triton's interpreter multiplies the bits of bfloat16 numbers; their products in fp32 are the same.
        FACTOR=tl.float32 if q.dtype == torch.bfloat16 and not q.is_cuda else _TYPES[q.dtype],
        BLOCK_GROUPS=max(triton.next_power_of_2(heads // kv_heads), LEAST_DOT),
        **sizes,
    )
    _combine[rows, heads](sums, logs, lengths, out, **sizes)
    return out


@decode_attention.register_fake
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    """What comes out, for tensors without memory: the kernels read nothing but their arguments."""
    heads, rows, dim = q.shape
    return q.new_empty((rows, heads, dim))

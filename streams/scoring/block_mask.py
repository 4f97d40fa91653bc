"""The block-sparse form of the attention mask, computed from expiry and lane: which blocks a kernel skips or need not mask.

Plain numpy on the host. It takes the latest expiry per (block of keys, lane) and the first index per (block of queries,
lane). In two blocks that do not overlap in time all keys precede all queries, so the key with the latest expiry and the
first query decide whether any pair is visible.

Invariants:
* equal, block for block, to FlexAttention's `create_block_mask` on the predicate, for any expiry and lane;
* O(L + blocks^2) per lane, where evaluating the predicate is O(L^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 128
"""Side of a block of the mask; rows are padded to a multiple of it."""


@dataclass(frozen=True)
class BlockLists:
    """The arrays of FlexAttention's BlockMask, by the same names, int32.

    `kv_*`: per query block, the key blocks that it visits. `q_*`: per key block, the query blocks that visit it. Counts are
    [1, 1, n]; indices are [1, 1, n, m] with the visited ones first. `full_*` blocks need no masking.
    """

    kv_num_blocks: np.ndarray
    kv_indices: np.ndarray
    full_kv_num_blocks: np.ndarray
    full_kv_indices: np.ndarray
    q_num_blocks: np.ndarray
    q_indices: np.ndarray
    full_q_num_blocks: np.ndarray
    full_q_indices: np.ndarray


def visible_blocks(expiry: np.ndarray, lane: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Return (partial, full), bool [n, n] as [query block, key block], of a row of tokens. expiry, lane: int [L].

    Full: every pair is visible (never so in a block that the row's end cuts). Partial: some pairs are, but not all.
    """
    length = len(expiry)
    count = -(-length // block)
    index = np.arange(count * block, dtype=np.int64).reshape(count, block)
    # The last block is filled up with keys that expire before the first query, in a lane of their own.
    until, lanes = np.zeros_like(index), np.full_like(index, -1)
    until.flat[:length] = np.clip(expiry, 0, length)
    lanes.flat[:length] = lane
    some = np.zeros((count, count), bool)
    latest = np.zeros(count, np.int64)
    for value in range(int(lane.min()), int(lane.max()) + 1):
        mine = lanes == value
        # Cumulative over lanes: a query of this lane also attends to the lanes before it.
        latest = np.maximum(latest, np.where(mine, until, 0).max(axis=1))
        # Blocks without a query of this lane get an index beyond every expiry.
        first = np.where(mine, index, index.size).min(axis=1)
        some |= latest[None, :] > first[:, None]
    some = np.tril(some, -1)
    # On the diagonal causality matters, too. If any query there sees a key, then the query at the key's own index does.
    np.fill_diagonal(some, (until > index).any(axis=1))
    # Every key outlives the block's last query, and every lane of the keys is admitted by every lane of the queries.
    outlives = until.min(axis=1)[None, :] > index[:, -1, None]
    admitted = lanes.max(axis=1)[None, :] <= lanes.min(axis=1)[:, None]
    full = np.tril(outlives & admitted, -1)
    return some & ~full, full


def block_lists(expiry: np.ndarray, lane: np.ndarray) -> BlockLists:
    """Return the block lists of a row of tokens; expiry, lane: int [L]."""
    partial, full = visible_blocks(expiry, lane)
    found = [part for dense in (partial, full, partial.T, full.T) for part in _ordered(dense)]
    return BlockLists(*found)


def interval_block_lists(queries: np.ndarray, keys: np.ndarray) -> BlockLists:
    """Return the block lists of stacked queries against keys that are visible for an interval; see `interval_block_mask`.

    queries: int [3, N] (region, place, lane). keys: int [4, K] (region, entry, exit, lane). N and K are whole blocks.
    Partial blocks are found by the extremes of their intervals only, so one may contain no visible pair: the kernel then
    masks all of it.
    """
    region, place, lane = queries.reshape(3, -1, 1, BLOCK)
    key_region, entry, leaves, key_lane = keys.reshape(4, 1, -1, BLOCK)
    low, high = (lambda t: t.min(axis=-1)), (lambda t: t.max(axis=-1))
    some = (low(region) <= high(key_region)) & (low(key_region) <= high(region)) & (low(key_lane) <= high(lane))
    # Exclude copies that are never visible (entry >= exit): they must not widen the block's [min entry, max exit) range.
    never = entry >= leaves
    some &= (low(np.where(never, place.max() + 1, entry)) <= high(place)) & (
        low(place) < high(np.where(never, 0, leaves))
    )
    same = (low(region) == high(key_region)) & (high(region) == low(key_region))
    full = same & (high(entry) <= low(place)) & (high(place) < low(leaves)) & (high(key_lane) <= low(lane))
    partial = some & ~full
    return BlockLists(*(part for dense in (partial, full, partial.T, full.T) for part in _ordered(dense)))


def _ordered(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of each row are True, and the columns: the True ones first, both kinds ascending."""
    columns = np.argsort(~dense, axis=1, kind="stable")
    return dense.sum(axis=1, dtype=np.int32)[None, None], columns.astype(np.int32)[None, None]

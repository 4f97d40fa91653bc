"""The block-sparse form of the attention mask, from expiry and lane alone: what a kernel skips, what it need not mask.

Plain numpy on the host. Per (block of keys, lane) the latest expiry, per (block of queries, lane) the
first index: of two blocks that do not overlap in time all keys precede all queries, so the key that lives longest and the
query that comes first decide for every pair. Invariants: equal, block for block, to FlexAttention's `create_block_mask` on
the predicate, for any expiry and lane; O(L + blocks^2) a lane, where evaluating the predicate is O(L^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 128
"""Side of a block of the mask; rows are padded to a multiple of it."""


@dataclass(frozen=True)
class BlockLists:
    """What FlexAttention's BlockMask holds, by the same names: int32, per query block (`kv_`) the key blocks that it visits,
    per key block (`q_`) the query blocks that visit it; counts [1, 1, n], indices [1, 1, n, m] with the visited ones first.
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
    """(partial, full) bool [n, n] of a row of tokens; [query block, key block]. expiry, lane: int [L].

    Full: every pair is visible (a block that the row's end cuts never is). Partial: some pair is, and not every one.
    """
    length = len(expiry)
    count = -(-length // block)
    index = np.arange(count * block, dtype=np.int64).reshape(count, block)
    # Behind the row's end stand keys that have expired before the first query, in a lane of their own.
    until, lanes = np.zeros_like(index), np.full_like(index, -1)
    until.flat[:length] = np.clip(expiry, 0, length)
    lanes.flat[:length] = lane
    some = np.zeros((count, count), bool)
    latest = np.zeros(count, np.int64)
    for value in range(int(lane.min()), int(lane.max()) + 1):
        mine = lanes == value
        # A query of this lane also attends to the lanes before it.
        latest = np.maximum(latest, np.where(mine, until, 0).max(axis=1))
        first = np.where(mine, index, index.size).min(axis=1)
        some |= latest[None, :] > first[:, None]
    some = np.tril(some, -1)
    # On the diagonal causality decides, too: if any query attends to a key there, then the key's own.
    np.fill_diagonal(some, (until > index).any(axis=1))
    outlives = until.min(axis=1)[None, :] > index[:, -1, None]
    admitted = lanes.max(axis=1)[None, :] <= lanes.min(axis=1)[:, None]
    full = np.tril(outlives & admitted, -1)
    return some & ~full, full


def block_lists(expiry: np.ndarray, lane: np.ndarray) -> BlockLists:
    """Of a row of tokens; expiry, lane: int [L]."""
    partial, full = visible_blocks(expiry, lane)
    found = [part for dense in (partial, full, partial.T, full.T) for part in _ordered(dense)]
    return BlockLists(*found)


def interval_block_lists(queries: np.ndarray, keys: np.ndarray) -> BlockLists:
    """Of queries int [3, N] (region, place, lane) against keys int [4, K] (region, entry, exit, lane), whole blocks of both.

    A partial block may turn out to hold no visible pair: it is found by the extremes of its intervals only.
    """
    region, place, lane = queries.reshape(3, -1, 1, BLOCK)
    key_region, entry, leaves, key_lane = keys.reshape(4, 1, -1, BLOCK)
    low, high = (lambda t: t.min(axis=-1)), (lambda t: t.max(axis=-1))
    some = (low(region) <= high(key_region)) & (low(key_region) <= high(region)) & (low(key_lane) <= high(lane))
    # A copy that nobody sees stretches no interval.
    never = entry >= leaves
    some &= (low(np.where(never, place.max() + 1, entry)) <= high(place)) & (
        low(place) < high(np.where(never, 0, leaves))
    )
    same = (low(region) == high(key_region)) & (high(region) == low(key_region))
    full = same & (high(entry) <= low(place)) & (high(place) < low(leaves)) & (high(key_lane) <= low(lane))
    partial = some & ~full
    return BlockLists(*(part for dense in (partial, full, partial.T, full.T) for part in _ordered(dense)))


def _ordered(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of each row are True, and the columns: the True ones first, both kinds ascending."""
    columns = np.argsort(~dense, axis=1, kind="stable")
    return dense.sum(axis=1, dtype=np.int32)[None, None], columns.astype(np.int32)[None, None]

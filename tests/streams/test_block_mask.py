"""The analytic block mask is `create_block_mask` on the predicate, block for block, for any expiry and lane."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from streams.log.record import NEVER
from streams.memory import MemoryConfig
from streams.scoring.block_mask import BLOCK, BlockLists, interval_block_lists, visible_blocks
from streams.scoring.mask import block_mask, dense_mask, mask_mod
from streams.scoring.packing import pack
from tests.support.streams import loud_backbone, random_turns, request, run

LISTS = tuple(BlockLists.__annotations__)


def evaluated(expiry: torch.Tensor, lane: torch.Tensor) -> BlockMask:
    """By evaluating the predicate at every point of the rows, end to end."""
    rows, length = expiry.shape
    flat = (expiry.clamp(max=length) + torch.arange(rows)[:, None] * length).flatten().int()
    total = rows * length
    return create_block_mask(mask_mod(flat, lane.flatten().int()), None, None, total, total, device="cpu")


def assert_equal(found: BlockMask, wanted: BlockMask) -> None:
    assert found.seq_lengths == wanted.seq_lengths
    assert found.BLOCK_SIZE == wanted.BLOCK_SIZE
    for name in LISTS:
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
        assert torch.equal(mine, theirs), name
        # As inputs of a compiled kernel: a view would be told apart.
        assert mine._base is None, name


def by_points(expiry: np.ndarray, lane: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(partial, full) from the dense mask, padded to whole blocks."""
    dense = dense_mask(torch.from_numpy(expiry)[None], torch.from_numpy(lane)[None])[0, 0].numpy()
    count = -(-len(expiry) // block)
    padded = np.zeros((count * block, count * block), bool)
    padded[: len(expiry), : len(expiry)] = dense
    blocks = padded.reshape(count, block, count, block)
    full = blocks.all(axis=(1, 3))
    return blocks.any(axis=(1, 3)) & ~full, full


TOKENS = st.lists(st.tuples(st.integers(-20, 60), st.integers(0, 2)), min_size=1, max_size=40)


@given(TOKENS, st.integers(2, 9))
@settings(max_examples=400, deadline=None)
def test_small_blocks_of_any_tokens_are_empty_partial_or_full_as_their_points_say(tokens, block):
    """Also tokens that expire before they are there: nothing hangs on what an engine would write."""
    expiry = np.array([i + life for i, (life, _) in enumerate(tokens)])
    lane = np.array([lane for _, lane in tokens])
    for found, wanted in zip(visible_blocks(expiry, lane, block), by_points(expiry, lane, block), strict=True):
        assert (found == wanted).all()


def random_row(rng: np.random.Generator, length: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A row of streams packed end to end, with padding: expiry by segments, as engines write it, or token by token."""
    expiry, lane = np.full(length, length, np.int64), np.zeros(length, np.int64)
    at, end = 0, int(rng.integers(length // 2, length + 1))
    while at < end:
        stop = min(end, at + int(rng.integers(1, 400)))
        index = np.arange(at, stop)
        if kind == "tokens":
            later = index + 1 + rng.integers(0, 600, len(index))
        else:
            size = int(rng.integers(1, 90))
            later = (index // size + 1 + rng.integers(0, 8, len(index) // size + 2)[(index - at) // size]) * size
        later = np.where(rng.random(len(index)) < 0.2, NEVER, later)
        expiry[at:stop] = np.clip(later, index + 1, stop)
        if kind == "lanes":
            lane[at:stop] = rng.integers(0, 2, len(index)) if rng.random() < 0.3 else index // 50 % 2
        at = stop
    return expiry, lane


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 800), st.sampled_from(["segments", "tokens", "lanes"]))
@settings(max_examples=60, deadline=None)
def test_packed_rows_give_the_block_mask_that_evaluating_every_point_gives(seed, rows, length, kind):
    rng = np.random.default_rng(seed)
    made = [random_row(rng, length, kind) for _ in range(rows)]
    expiry, lane = (torch.from_numpy(np.stack(columns)) for columns in zip(*made, strict=True))
    assert_equal(block_mask(expiry, lane), evaluated(expiry, lane))


@pytest.mark.parametrize("length", [2 * BLOCK, 5 * BLOCK + 1, 5 * BLOCK - 1])
def test_full_blocks_are_found_and_the_rows_end_cuts_them(length):
    """What the property tests rest on: rows that do have full, partial and empty blocks."""
    index = torch.arange(length)
    expiry = torch.where(index < BLOCK, length, (index + 3 * BLOCK).clamp(max=length))[None]
    lane = torch.zeros_like(expiry)
    found = block_mask(expiry, lane)
    assert_equal(found, evaluated(expiry, lane))
    count = -(-length // BLOCK)
    assert int(found.full_kv_num_blocks.sum()) > 0
    assert int(found.kv_num_blocks.sum()) >= count
    cut = length % BLOCK
    assert bool(cut) == (int(found.full_kv_num_blocks[0, 0, -1]) == 0)


def test_an_expiry_beyond_its_row_does_not_reach_into_the_next():
    lane = torch.zeros(3, 150, dtype=torch.long)
    never = torch.full_like(lane, NEVER)
    assert_equal(block_mask(never, lane), block_mask(torch.full_like(lane, 150), lane))


def test_logs_of_the_engine_give_the_block_mask_that_evaluating_every_point_gives(tmp_path):
    backbone = loud_backbone(tmp_path, torch.float32)
    rng = np.random.default_rng(4)
    memory = [
        MemoryConfig("rcsm", 2),
        MemoryConfig("random", rate=0.3),
        MemoryConfig("sink_window", 2, text_window=3, sink_tokens=2, tail_tokens=4),
        MemoryConfig("text_memory"),
    ]
    logs = run(
        backbone, [request(backbone, memory[i % 4], random_turns(backbone, rng, 9 + i), f"s{i}") for i in range(6)]
    )
    assert set(logs[3].lane) == {0, 1}
    for layout in ([[0, 1, 2, 3, 4, 5]], [[0, 4], [1, 2], [5]], [[3]]):
        rows = pack(logs, layout)
        assert_equal(block_mask(rows.expiry, rows.lane), evaluated(rows.expiry, rows.lane))


@given(seed=st.integers(0, 2**32 - 1), stacked=st.integers(1, 4), lanes=st.booleans())
@settings(max_examples=30)
def test_blocks_of_intervals_skip_nothing_visible_and_leave_unmasked_only_what_is_all_visible(seed, stacked, lanes):
    rng = np.random.default_rng(seed)
    length, count = 3 * BLOCK, 4 * BLOCK
    place = np.tile(np.arange(length), stacked)
    lane = np.sort(rng.integers(0, 1 + lanes, length))
    queries = np.stack([np.repeat(np.arange(stacked), length), place, np.tile(lane, stacked)])
    entry = np.sort(rng.integers(0, length, count)) if rng.random() < 0.5 else rng.integers(0, 40, count)
    keys = np.stack([np.sort(rng.integers(0, stacked, count)), entry, rng.integers(0, 2 * length, count), entry * 0])
    keys[2, rng.random(count) < 0.2] = 0
    visible = (queries[0][:, None] == keys[0]) & (keys[1] <= place[:, None]) & (place[:, None] < keys[2])
    visible &= keys[3] <= queries[2][:, None]
    blocks = visible.reshape(3 * stacked, BLOCK, 4, BLOCK).transpose(0, 2, 1, 3)
    lists = interval_block_lists(queries, keys)
    full = listed(lists.full_kv_num_blocks, lists.full_kv_indices)
    partial = listed(lists.kv_num_blocks, lists.kv_indices)
    assert (full == blocks.all(axis=(2, 3))).all()
    assert (partial | full)[blocks.any(axis=(2, 3))].all()
    assert (listed(lists.q_num_blocks, lists.q_indices) == partial.T).all()
    assert (listed(lists.full_q_num_blocks, lists.full_q_indices) == full.T).all()


def listed(counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """bool [rows, columns] of FlexAttention's lists."""
    found = np.zeros(indices.shape[2:], bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, columns[:count]] = True
    return found

"""The KV pool: who owns a slot, where a stream's tokens lie, and which keys move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine.kv_pool import KVPool
from rollout.engine.slots import BlockBook, PagedBook
from streams.memory import Rows

CAPACITY = 60
TURNS = st.lists(
    st.tuples(st.integers(0, 2), st.randoms(use_true_random=False), st.integers(0, 12), st.integers(0, 6)), max_size=25
)


@pytest.mark.parametrize(("paged", "keeps"), [(False, False), (True, True), (True, False)])
@given(TURNS)
@settings(max_examples=150)
def test_every_live_token_finds_its_key_and_no_slot_has_two_owners(paged, keeps, turns):
    """Three streams take turns; each writes its tokens' names into a pool and finds them again under its slots."""
    pool = KVPool(CAPACITY, layers=1, kv_heads=1, head_dim=1, paged=paged)
    streams = [pool.book.open(20, keeps=keeps) for _ in range(3)]
    tokens: list[list[int]] = [[], [], []]
    lengths = [0, 0, 0]

    def write(which: int, count: int) -> None:
        slots = streams[which].add(count)
        names = torch.arange(lengths[which], lengths[which] + count) + 1000.0 * which
        pool.write(0, torch.from_numpy(slots), names.view(1, -1, 1), -names.view(1, -1, 1))
        tokens[which] += range(lengths[which], lengths[which] + count)
        lengths[which] += count

    for which, luck, coming, generated in turns:
        held = len(tokens[which])
        leaving = sorted(luck.sample(range(held), luck.randint(0, held)))
        evicted = Rows.where(np.isin(np.arange(held), leaving))
        room = 20 - len(tokens[which])
        coming, generated = min(coming, room), min(generated, max(0, room - coming))
        assert streams[which].has_room(coming, evicted, generated), "three bounds are the pool"
        dropped = streams[which].drop(evicted, coming)
        tokens[which] = [token for row, token in enumerate(tokens[which]) if row not in leaving]
        assert not set(dropped.source.tolist()) & set(dropped.target.tolist())
        pool.move(0, torch.from_numpy(dropped.source), torch.from_numpy(dropped.target))
        write(which, coming)
        streams[which].expect(generated)
        streams[which].give_back(dropped.freed)
        row = streams[which].row(generated)
        assert len(row) == len(tokens[which]) + generated
        assert set(streams[which].held.tolist()) == set(row[: len(tokens[which])].tolist())
        write(which, generated)
        assert sorted(row.tolist()) == sorted(streams[which].held.tolist()), "the slots that were said to come"
        if not paged:
            assert len(set(np.diff(row).tolist())) <= 1, "one range"
        owners = [slot for stream in streams for slot in stream.held.tolist()]
        assert len(set(owners)) == len(owners)
        for number, stream in enumerate(streams):
            found = pool.keys(0)[torch.from_numpy(stream.held.copy()), 0, 0] - 1000 * number
            assert found.tolist() == tokens[number]
    for stream in streams:
        stream.close()
    assert pool.available == pool.capacity == CAPACITY
    assert pool.book.fits(CAPACITY, CAPACITY, keeps=True)


def test_new_tokens_take_the_places_of_old_ones_and_nothing_moves():
    pool = KVPool(30, layers=1, kv_heads=1, head_dim=1)
    slots = pool.book.open(20, keeps=True)
    slots.add(10)
    dropped = slots.drop(Rows([(2, 6)]), coming=4)
    assert not len(dropped.source)
    assert sorted(slots.add(4).tolist()) == [2, 3, 4, 5]


def test_what_moves_is_counted_in_bytes():
    pool = KVPool(30, layers=3, kv_heads=2, head_dim=4)
    pool.keep_raw()
    slots = pool.book.open(20, keeps=True)
    slots.add(10)
    dropped = slots.drop(Rows([(0, 6)]), coming=3)
    assert len(dropped.source) == 3
    for layer in range(3):
        pool.move(layer, torch.from_numpy(dropped.source), torch.from_numpy(dropped.target))
    assert pool.copied_bytes == 3 * KVPool.bytes_per_slot(3, 2, 4, torch.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 24)), max_size=40))
def test_blocks_never_overlap_and_all_come_back(events):
    book, blocks = BlockBook(24), []
    for opens, size in events:
        if opens and book.fits(size, size, keeps=True):
            stream = book.open(size, keeps=True)
            blocks.append((size, stream))
        elif blocks:
            blocks.pop(size % len(blocks))[1].close()
        owned = [slot for number, (_, stream) in enumerate(blocks) for slot in stream.row(0).tolist()]
        assert len(owned) == len(set(owned))
        assert book.available == 24 - sum(size for size, _ in blocks)
    for size, stream in blocks:
        stream.add(size)
        with pytest.raises(RuntimeError, match="KV pool exhausted"):
            stream.add(1)
    taken = [slot for _, stream in blocks for slot in stream.held.tolist()]
    assert len(set(taken)) == len(taken)


def test_pages_that_are_not_there_are_an_error_of_the_engine():
    book = PagedBook(4)
    slots = book.allocate(2)
    with pytest.raises(RuntimeError, match="KV pool exhausted: 3 slots wanted, 2 of 4 free"):
        book.allocate(3)
    book.free(slots)
    with pytest.raises(AssertionError, match="nobody holds"):
        book.free(slots)


def test_a_page_that_others_hold_does_not_come_back_when_one_drops_it():
    """Two hold six slots together; what one of them evicts is no room for its next turn until the other has left."""
    book = PagedBook(8)
    first, second = (book.open(8, keeps=False) for _ in range(2))
    first.add(6)
    assert [len(slots) for slots in second.share(first, 6, copy=False)] == [0, 0], "nothing is copied"
    assert book.available == 2
    evicted = Rows([(0, 6)])
    assert second.has_room(2, evicted, 0)
    assert not second.has_room(2, evicted, 1)
    first.close()
    assert book.available == 2, "the other still holds them"
    assert second.has_room(2, evicted, 6)
    dropped = second.drop(evicted, 2)
    assert not len(dropped.source)
    second.add(2)
    second.expect(6)
    assert book.available == 0
    second.give_back(dropped.freed)
    assert len(set(second.row(6).tolist())) == 8
    second.close()
    assert book.available == 8


def test_a_pool_without_a_single_slot_is_refused_by_its_config_key():
    with pytest.raises(ValueError, match=r"rollout\.kv_memory_mb"):
        KVPool(0, layers=1, kv_heads=1, head_dim=1)


@pytest.mark.parametrize("paged", [False, True])
def test_bytes_per_slot_is_what_the_pool_allocates_and_one_slot_for_nobody(paged):
    pool = KVPool(5, layers=3, kv_heads=2, head_dim=8, dtype=torch.bfloat16, paged=paged)
    assert pool.kv.nbytes == 6 * KVPool.bytes_per_slot(3, 2, 8, torch.bfloat16)


@pytest.mark.parametrize(("book_type", "keeps"), [(PagedBook, True), (PagedBook, False), (BlockBook, False)])
def test_slots_stay_parallel_to_the_live_tokens(book_type, keeps):
    slots = book_type(20).open(10, keeps=keeps)
    a, b, c = slots.add(3).tolist()
    before = slots.held
    slots.drop(Rows([(1, 2)]), coming=1)
    (d,) = slots.add(1).tolist()
    assert slots.held.tolist() == [a, c, d]
    assert before.tolist() == [a, b, c], "a segment keeps the list that it was planned with"
    with pytest.raises(AssertionError, match="only tokens that have slots"):
        slots.drop(Rows([(2, 4)]), coming=0)

"""Slots of the KV pool: which are free, and which a stream's tokens have.

Two books keep them. `PagedBook` gives a stream any free slots, turn by turn as it needs them, and nothing is ever moved.
`BlockBook` gives it one block of all that it may ever need when it is admitted, so that its live keys are one range of
memory: a block that grew would have to move. New tokens then take the places of evicted ones (the order of keys means
nothing to attention), and only where more leave than come are some moved to close the gap.

Invariants:
* a slot is free or has holders: one stream, or with pages those that share a prefix, and is free when the last drops it;
* a slot that is shared is not written again;
* a stream has a slot for every live token that was forwarded, in the order of the log;
* paged: slots of evicted tokens are given back after the forward that may still see them;
* paged: the slots that a stream keeps (`open`) are there for it whenever it wants them;
* blocks: whenever a stream decodes, its tokens fill the first slots of its block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from streams.memory.rows import Rows

_NONE = np.zeros(0, np.int64)


class Dropped(NamedTuple):
    """What an eviction leaves to do, all int64 [n].

    Attributes:
        freed: slots to give back (`StreamSlots.give_back`) after the forward.
        source, target: keys to move before the new tokens are written, from slots to slots.
    """

    freed: np.ndarray = _NONE
    source: np.ndarray = _NONE
    target: np.ndarray = _NONE


_NOTHING = Dropped()


class StreamSlots(ABC):
    """The slots of one stream.

    held: int64 [n]; row i is the slot of its i-th live token. The last of those may have no slot yet.
    """

    def __init__(self) -> None:
        # The first rows of `_room`. Rows come behind them, or in a new array: who has it keeps what was there.
        self.held: np.ndarray = _NONE
        self._room: np.ndarray = _NONE

    def __len__(self) -> int:
        return len(self.held)

    def add(self, count: int) -> np.ndarray:
        """Give slots to the next `count` tokens; returns them."""
        slots = self._take(count)
        self._hold(slots)
        return slots

    @property
    def range(self) -> tuple[int, int] | None:
        """The range [first, stop) that the held tokens' slots fill, in any order; None: they may lie anywhere."""
        return None

    @property
    @abstractmethod
    def owned(self) -> int:
        """How many slots it has taken from the book and not given back, and will take for a turn that is planned."""

    @abstractmethod
    def has_room(self, coming: int, leaving: Rows, ahead: int) -> bool:
        """Whether its next turn can begin now.

        coming: tokens of its prefill. leaving: rows of the tokens that it evicts; their slots come back after the prefill,
        before those of the `ahead` tokens that it may generate are taken.
        """

    @abstractmethod
    def drop(self, rows: Rows, coming: int) -> Dropped:
        """Forget the tokens in these rows, as `coming` new ones are about to be added."""

    @abstractmethod
    def share(self, leader: StreamSlots, count: int, *, copy: bool) -> tuple[np.ndarray, np.ndarray]:
        """Hold the first `count` tokens as `leader` does, whose first ones are the same.

        Returns the slots to copy from and to, once the leader's are written: none where both hold one slot. copy: each
        needs keys of its own.
        """

    @abstractmethod
    def expect(self, ahead: int) -> None:
        """Say that `row` will ask for the slots of `ahead` tokens: nobody else may count on them."""

    @abstractmethod
    def row(self, ahead: int) -> np.ndarray:
        """Return the slots of the held tokens, in any order, and behind them those of the next `ahead` tokens."""

    @abstractmethod
    def give_back(self, slots: np.ndarray) -> None:
        """Return slots that `drop` has freed to the book."""

    @abstractmethod
    def close(self) -> None:
        """Return all slots to the book."""

    @abstractmethod
    def _take(self, count: int) -> np.ndarray: ...

    def _hold(self, slots: np.ndarray) -> None:
        """Add the slots of the next tokens, int64 [n]."""
        before = len(self.held)
        after = before + len(slots)
        if after > len(self._room):
            self._room = np.empty(after + after // 2, np.int64)
            self._room[:before] = self.held
        self._room[before:after] = slots
        self.held = self._room[:after]

    def _forget(self, rows: Rows) -> np.ndarray:
        """Let go of the tokens in these rows; returns their slots."""
        slots = self.held
        assert rows.ranges[-1][1] <= len(slots), "only tokens that have slots leave"
        self.held = self._room = rows.without(slots)
        return rows.of(slots)


class SlotBook(ABC):
    """All slots of one pool. `available` counts those that no stream has."""

    def __init__(self, slots: int) -> None:
        self.capacity = slots

    @property
    @abstractmethod
    def available(self) -> int: ...

    @abstractmethod
    def fits(self, need: int, bound: int, *, keeps: bool) -> bool:
        """Whether a stream could be opened now.

        need: slots that it takes at first. bound: the most that it will hold at once. keeps: it never waits for one of them,
        and no other stream may count on them.
        """

    @abstractmethod
    def open(self, bound: int, *, keeps: bool) -> StreamSlots:
        """Return the slots of a new stream; `fits` was asked."""

    @abstractmethod
    def clear(self) -> None:
        """Take every slot back; streams that have some must not be used any more."""


class PagedBook(SlotBook):
    """Any slot for any token, as turns need them.

    What streams keep is given to nobody else: `spare` is what the others may have. Each of those others fits into the pool
    beside all that is kept (`fits`), so it can always go on once it is alone with it.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.clear()

    def clear(self) -> None:
        self._free = np.arange(self.capacity - 1, -1, -1, dtype=np.int64)
        self._count = self.capacity
        self._holders = np.zeros(self.capacity, np.int32)
        self._open: set[_PagedSlots] = set()
        self._bounds = 0  # of the streams that keep theirs
        self.kept = 0  # slots that streams which keep their bound have not taken yet
        self.due = 0  # slots that `row` will take for turns whose prefill is planned
        self.leaving = 0  # slots that such prefills will give back before

    @property
    def available(self) -> int:
        return self._count

    @property
    def spare(self) -> int:
        """Free slots that no stream keeps."""
        return self._count - self.kept

    def fits(self, need: int, bound: int, *, keeps: bool) -> bool:
        together = bound + self._bounds
        if keeps:
            together += max((stream.bound for stream in self._open if not stream.keeps), default=0)
        return together <= self.capacity and (bound if keeps else need) <= self.spare - self.due

    def open(self, bound: int, *, keeps: bool) -> StreamSlots:
        stream = _PagedSlots(self, bound, keeps)
        self._open.add(stream)
        if keeps:
            self.kept += bound
            self._bounds += bound
        return stream

    def shut(self, stream: _PagedSlots) -> None:
        """Forget a stream that has given all its slots back."""
        self._open.remove(stream)
        if stream.keeps:
            self.kept -= stream.bound
            self._bounds -= stream.bound

    def allocate(self, count: int) -> np.ndarray:
        """Return free slots, int64 [count].

        Raises RuntimeError if there are fewer: a turn begins only with room for it, so that is an error in the engine.
        """
        if count > self._count:
            raise RuntimeError(f"KV pool exhausted: {count} slots wanted, {self._count} of {self.capacity} free")
        slots = self._free[self._count - count : self._count].copy()
        self._count -= count
        assert not self._holders[slots].any(), "a slot was given out twice"
        self._holders[slots] = 1
        return slots

    def hold(self, slots: np.ndarray) -> None:
        """Count one holder more of slots int64 [n]."""
        assert self._holders[slots].all(), "only a slot that somebody holds is shared"
        self._holders[slots] += 1

    def alone(self, slots: np.ndarray) -> int:
        """Return how many of these slots have one holder only."""
        return int(np.count_nonzero(self._holders[slots] == 1))

    def free(self, slots: np.ndarray) -> None:
        """Drop one holder of slots int64 [n]; those that have no other are free."""
        assert self._holders[slots].all(), "a slot was freed that nobody holds"
        self._holders[slots] -= 1
        gone = slots[self._holders[slots] == 0]
        self._free[self._count : self._count + len(gone)] = gone
        self._count += len(gone)


class _PagedSlots(StreamSlots):
    def __init__(self, book: PagedBook, bound: int, keeps: bool) -> None:
        super().__init__()
        self.bound, self.keeps = bound, keeps
        self._book = book
        self._owned = 0
        self._ahead = _NONE  # taken from the book for tokens that are not there yet
        self._due = self._leaving = 0  # its part of the book's

    @property
    def owned(self) -> int:
        return self._owned + self._due

    def has_room(self, coming: int, leaving: Rows, ahead: int) -> bool:
        if self.keeps:
            return True
        book, own = self._book, len(self._ahead)
        now = max(0, coming - own)
        later = max(0, coming + ahead - own) - now
        if now + later <= book.spare - book.due:
            return True
        back = book.leaving + book.alone(leaving.of(self.held))
        return now <= book.spare and now + later <= book.spare - book.due + back

    def drop(self, rows: Rows, coming: int) -> Dropped:
        if not rows.ranges:
            return _NOTHING
        freed = self._forget(rows)
        if not self.keeps:
            self._count(0, self._book.alone(freed))
        return Dropped(freed=freed)

    def share(self, leader: StreamSlots, count: int, *, copy: bool) -> tuple[np.ndarray, np.ndarray]:
        source = leader.held[:count]
        if copy:
            return source, self.add(count)
        assert not self.keeps, "a slot that others hold does not come back when it is dropped"
        self._book.hold(source)
        self._owned += count
        self._hold(source)
        return _NONE, _NONE

    def expect(self, ahead: int) -> None:
        if not self.keeps:
            self._count(max(0, ahead - len(self._ahead)), self._leaving)

    def row(self, ahead: int) -> np.ndarray:
        self._count(0, self._leaving)
        self._ahead = np.concatenate((self._ahead, self._allocate(max(0, ahead - len(self._ahead)))))
        return np.concatenate((self.held, self._ahead[:ahead]))

    def give_back(self, slots: np.ndarray) -> None:
        self._count(self._due, 0)
        self._free(slots)

    def close(self) -> None:
        self._count(0, 0)
        self._free(self.held)
        self._free(self._ahead)
        self._book.shut(self)

    def _take(self, count: int) -> np.ndarray:
        taken, self._ahead = self._ahead[:count], self._ahead[count:]
        return np.concatenate((taken, self._allocate(count - len(taken))))

    def _allocate(self, count: int) -> np.ndarray:
        self._owned += count
        self._book.kept -= count if self.keeps else 0
        return self._book.allocate(count)

    def _free(self, slots: np.ndarray) -> None:
        self._owned -= len(slots)
        self._book.kept += len(slots) if self.keeps else 0
        self._book.free(slots)

    def _count(self, due: int, leaving: int) -> None:
        """Set its part of what the book expects to be taken and given back."""
        self._book.due += due - self._due
        self._book.leaving += leaving - self._leaving
        self._due, self._leaving = due, leaving


class BlockBook(SlotBook):
    """One block of neighbouring slots a stream, of the size that it may need."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.clear()

    def clear(self) -> None:
        # (first slot, number) of every free range, ascending; neighbours are joined.
        self._free = [(0, self.capacity)]

    @property
    def available(self) -> int:
        return sum(size for _, size in self._free)

    def fits(self, need: int, bound: int, *, keeps: bool) -> bool:
        return any(size >= bound for _, size in self._free)

    def open(self, bound: int, *, keeps: bool) -> StreamSlots:
        at = next(i for i, (_, size) in enumerate(self._free) if size >= bound)
        first, size = self._free[at]
        self._free[at : at + 1] = [(first + bound, size - bound)] if size > bound else []
        return _BlockSlots(self, first, bound)

    def free(self, first: int, count: int) -> None:
        """Take a block back."""
        ranges = sorted([*self._free, (first, count)])
        joined = ranges[:1]
        for start, size in ranges[1:]:
            last_start, last_size = joined[-1]
            assert last_start + last_size <= start, "a block was freed that nobody holds"
            if last_start + last_size == start:
                joined[-1] = (last_start, last_size + size)
            else:
                joined.append((start, size))
        self._free = joined


class _BlockSlots(StreamSlots):
    """Held tokens and holes together are the block's first slots; `_holes` int64 ascending are taken first."""

    def __init__(self, book: BlockBook, first: int, size: int) -> None:
        super().__init__()
        self._book, self._first, self._size = book, first, size
        self._holes = _NONE
        self._block = np.arange(first, first + size)
        self._used = 0  # slots of the block that hold tokens or are holes

    @property
    def range(self) -> tuple[int, int] | None:
        return None if len(self._holes) else (self._first, self._first + self._used)

    @property
    def owned(self) -> int:
        return self._size

    def has_room(self, coming: int, leaving: Rows, ahead: int) -> bool:
        return True  # its block has room for all that it may hold

    def share(self, leader: StreamSlots, count: int, *, copy: bool) -> tuple[np.ndarray, np.ndarray]:
        # Always copied: SDPA reads one range.
        return leader.held[:count], self.add(count)

    def expect(self, ahead: int) -> None:
        pass

    def drop(self, rows: Rows, coming: int) -> Dropped:
        if not rows.ranges:
            return _NOTHING
        holes = np.concatenate((self._holes, self._forget(rows)))
        holes.sort()
        end = self._first + len(self.held) + coming
        if self._first + self._used <= end:  # the new tokens fill every hole
            self._holes = holes
            return _NOTHING
        # More leave than come: what lies behind the new end moves into the first holes before it.
        behind = (self.held >= end).nonzero()[0]
        holes = holes[: holes.searchsorted(end)]
        target, self._holes = holes[: len(behind)], holes[len(behind) :]
        source = self.held[behind]
        # In place: `_forget` has just made it.
        self.held[behind] = target
        self._used = end - self._first
        return Dropped(source=source, target=target)

    def row(self, ahead: int) -> np.ndarray:
        assert not len(self._holes), "a stream decodes with holes among its keys"
        self._check(ahead)
        return self._block[: self._used + ahead]

    def give_back(self, slots: np.ndarray) -> None:
        assert not len(slots), "a block keeps its slots"

    def close(self) -> None:
        self._book.free(self._first, self._size)

    def _check(self, more: int) -> None:
        """Raise RuntimeError for more slots than the block has: streams are promised them, so the engine is wrong."""
        if self._used + more > self._size:
            raise RuntimeError(f"KV pool exhausted: {self._used + more} slots wanted of a block of {self._size}")

    def _take(self, count: int) -> np.ndarray:
        filled, self._holes = self._holes[:count], self._holes[count:]
        more = count - len(filled)
        self._check(more)
        fresh = self._block[self._used : self._used + more]
        self._used += more
        return np.concatenate((filled, fresh)) if len(filled) else fresh

"""Slots of the KV pool: which are free, and which a stream's tokens have.

Two books keep them. `PagedBook` gives a stream any free slots, and nothing is ever moved. `BlockBook` gives it one block
when it is admitted, so that its live keys are one range of memory. New tokens then take the places of evicted ones (the order
of keys means nothing to attention), and only where more leave than come are some moved to close the gap.

Invariants:
* a slot is free or belongs to one stream, never both;
* a stream has a slot for every live token that was forwarded, in the order of the log;
* paged: slots of evicted tokens are given back after the forward that may still see them;
* blocks: whenever a stream decodes, its tokens fill the first slots of its block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from streams.log.columns import Columns

_NONE = np.zeros(0, np.int64)


def _none() -> np.ndarray:
    return _NONE


@dataclass(frozen=True)
class Dropped:
    """What an eviction leaves to do, all int64 [n].

    Attributes:
        freed: slots to give back (`StreamSlots.give_back`) after the forward.
        source, target: keys to move before the new tokens are written, from slots to slots.
    """

    freed: np.ndarray = field(default_factory=_none)
    source: np.ndarray = field(default_factory=_none)
    target: np.ndarray = field(default_factory=_none)


class StreamSlots(ABC):
    """The slots of one stream, by log index."""

    def __init__(self) -> None:
        self._columns = Columns({"index": np.dtype(np.int64), "slot": np.dtype(np.int64)})

    @property
    def held(self) -> np.ndarray:
        """Slots int64 [n], a view that later changes leave alone: `drop` makes new columns, `add` writes behind its end."""
        return self._columns.column("slot")

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def add(self, start: int, count: int) -> np.ndarray:
        """Give slots to the `count` tokens from log index `start` on; returns them."""
        slots = self._take(count)
        self._columns.append(count, index=np.arange(start, start + count), slot=slots)
        return slots

    def of(self, indices: np.ndarray) -> np.ndarray:
        """Return the slots of these tokens, by ascending log index."""
        return self.held[self._rows(indices)]

    @abstractmethod
    def drop(self, indices: np.ndarray, coming: int) -> Dropped:
        """Forget these tokens, by ascending log index, as `coming` new ones are about to be added."""

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

    def _forget(self, indices: np.ndarray) -> np.ndarray:
        at, slots = self._rows(indices), self.held
        keep = np.ones(len(slots), bool)
        keep[at] = False
        self._columns.keep(keep)
        return slots[at]

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        index = self._columns.column("index")
        at = np.searchsorted(index, indices)
        assert (index[at] == indices).all(), "only forwarded live tokens have slots"
        return at


class SlotBook(ABC):
    """All slots of one pool. `available` counts those that no stream has."""

    def __init__(self, slots: int) -> None:
        self.capacity = slots

    @property
    @abstractmethod
    def available(self) -> int: ...

    @abstractmethod
    def fits(self, count: int) -> bool:
        """Whether a stream of at most `count` slots could be opened now."""

    @abstractmethod
    def open(self, count: int) -> StreamSlots:
        """Return the slots of a new stream, which may hold `count` at once; `fits` was asked."""

    @abstractmethod
    def clear(self) -> None:
        """Take every slot back; streams that have some must not be used any more."""


class PagedBook(SlotBook):
    """Any slot for any token; what streams may still need is counted as promised."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.clear()

    def clear(self) -> None:
        self._free = np.arange(self.capacity - 1, -1, -1, dtype=np.int64)
        self._count = self.capacity
        self._taken = np.zeros(self.capacity, bool)
        self._promised = 0

    @property
    def available(self) -> int:
        return self._count

    def fits(self, count: int) -> bool:
        return self._promised + count <= self.capacity

    def open(self, count: int) -> StreamSlots:
        self._promised += count
        return _PagedSlots(self, count)

    def allocate(self, count: int) -> np.ndarray:
        """Return free slots, int64 [count].

        Raises RuntimeError if there are fewer: streams are promised slots before they run, so that is an error in the engine.
        """
        if count > self._count:
            raise RuntimeError(f"KV pool exhausted: {count} slots wanted, {self._count} of {self.capacity} free")
        slots = self._free[self._count - count : self._count].copy()
        self._count -= count
        assert not self._taken[slots].any(), "a slot was given out twice"
        self._taken[slots] = True
        return slots

    def free(self, slots: np.ndarray) -> None:
        """Take slots int64 [n] back."""
        assert self._taken[slots].all(), "a slot was freed that nobody holds"
        self._taken[slots] = False
        self._free[self._count : self._count + len(slots)] = slots
        self._count += len(slots)

    def forgo(self, count: int) -> None:
        """Take back what a stream was promised."""
        self._promised -= count


class _PagedSlots(StreamSlots):
    def __init__(self, book: PagedBook, promised: int) -> None:
        super().__init__()
        self._book, self._promised = book, promised
        self._ahead = _NONE  # taken from the book for tokens that are not there yet

    def drop(self, indices: np.ndarray, coming: int) -> Dropped:
        return Dropped(freed=self._forget(indices)) if len(indices) else Dropped()

    def row(self, ahead: int) -> np.ndarray:
        self._ahead = np.append(self._ahead, self._book.allocate(max(0, ahead - len(self._ahead))))
        return np.append(self.held, self._ahead[:ahead])

    def give_back(self, slots: np.ndarray) -> None:
        self._book.free(slots)

    def close(self) -> None:
        self._book.free(self.held)
        self._book.free(self._ahead)
        self._book.forgo(self._promised)

    def _take(self, count: int) -> np.ndarray:
        taken, self._ahead = self._ahead[:count], self._ahead[count:]
        return np.append(taken, self._book.allocate(count - len(taken)))


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

    def fits(self, count: int) -> bool:
        return any(size >= count for _, size in self._free)

    def open(self, count: int) -> StreamSlots:
        at = next(i for i, (_, size) in enumerate(self._free) if size >= count)
        first, size = self._free[at]
        self._free[at : at + 1] = [(first + count, size - count)] if size > count else []
        return _BlockSlots(self, first, count)

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

    def drop(self, indices: np.ndarray, coming: int) -> Dropped:
        if not len(indices):
            return Dropped()
        holes = np.sort(np.append(self._holes, self._forget(indices)))
        end = self._first + len(self.held) + coming
        if self._first + self._used <= end:  # the new tokens fill every hole
            self._holes = holes
            return Dropped()
        # More leave than come: what lies behind the new end moves into the first holes before it.
        slots = self.held
        behind = np.flatnonzero(slots >= end)
        target, self._holes = np.split(holes[holes < end], [len(behind)])
        source = slots[behind]
        self._columns.write("slot", behind, target)
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
        return np.append(filled, fresh) if len(filled) else fresh

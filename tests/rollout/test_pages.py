"""The accounting of pages, without a model: streams come, grow, share, forget, are given back and end, at random.

The machine does what the engine does in a visit (`rollout.engine.engine`), with the slots alone. A model beside it knows who
holds which slot; the book must agree with it after every step.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout.engine.slots import PagedBook
from streams.memory import Rows

CAPACITY = 48


class Paged:
    """One stream: its live tokens by log index, and how many its running turn may still bring."""

    def __init__(self, book: PagedBook, number: int, bound: int, keeps: bool) -> None:
        self.number, self.bound, self.keeps = number, bound, keeps
        self.slots = book.open(bound, keeps=keeps)
        self.live: list[int] = []
        self.slot_of: dict[int, int] = {}
        self.length = self.ahead = 0
        self.in_turn = False
        self.ahead_slots: list[int] = []  # taken for tokens that are not there yet

    def add(self, count: int) -> list[int]:
        """Forward `count` more tokens; returns their slots."""
        slots = self.slots.add(count).tolist()
        self.live += range(self.length, self.length + count)
        self.slot_of |= zip(range(self.length, self.length + count), slots, strict=True)
        self.length += count
        self.ahead_slots = self.ahead_slots[count:]
        return slots

    @property
    def holds(self) -> list[int]:
        return [*self.slots.held.tolist(), *self.ahead_slots]


class Pages(RuleBasedStateMachine):
    """Engine and admission as far as pages go; the queue is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.book = PagedBook(CAPACITY)
        self.running: list[Paged] = []  # the oldest first
        self.came = 0
        self.planned: list[Paged] = []
        self.freed: list[tuple[Paged, np.ndarray]] = []
        self.leader: tuple[Paged, int] | None = None

    # --- what happens -----------------------------------------------------------------------------------------

    @rule(bound=st.integers(2, CAPACITY), first=st.data(), keeps=st.booleans())
    def come(self, bound: int, first: st.DataObject, keeps: bool) -> None:
        """A stream is admitted with room for its first turn, which begins at once."""
        coming = first.draw(st.integers(1, bound - 1))
        ahead = first.draw(st.integers(0, bound - coming))
        if not self.book.fits(coming + ahead, bound, keeps=keeps):
            return
        stream = Paged(self.book, self.came, bound, keeps)
        self.came += 1
        self.running.append(stream)
        assert stream.slots.has_room(coming, Rows(), ahead), "it was admitted with that room"
        self._place(stream, coming, [], ahead)
        self._forward()

    @rule(bound=st.integers(2, 20), first=st.data(), others=st.integers(1, 3))
    def come_as_a_group(self, bound: int, first: st.DataObject, others: int) -> None:
        """Streams with one first turn: those behind the first hold its slots, or copy them."""
        coming = first.draw(st.integers(1, bound - 1))
        ahead = first.draw(st.integers(0, bound - coming))
        copy = first.draw(st.booleans())
        for i in range(1 + others):
            if not self.book.fits(coming + ahead, bound, keeps=False):
                break
            stream = Paged(self.book, self.came, bound, keeps=False)
            self.came += 1
            self.running.append(stream)
            assert stream.slots.has_room(coming if copy else 0, Rows(), ahead)
            self._place(stream, coming, [], ahead, lead=i == 0, copy=copy)
        self._forward()

    @precondition(lambda self: self.running)
    @rule(luck=st.randoms(use_true_random=False))
    def visit(self, luck: Random) -> None:
        """Running turns bring tokens, and most are over then. Those streams begin the next, the oldest first.

        Where there is no room, the youngest are given back.
        """
        for stream in self.running:
            if stream.in_turn:
                count = luck.randint(0, stream.ahead)
                said = stream.ahead_slots[:count]
                assert stream.add(count) == said, "the slots that were said to come"
                stream.ahead -= count
                stream.in_turn = luck.random() < 0.2
        for stream in list(self.running):
            if stream not in self.running or stream.in_turn or luck.random() < 0.1:
                continue
            if stream.ahead:  # END
                stream.add(1)
                stream.ahead -= 1
            room = stream.bound - len(stream.live)
            if not room:  # what is evicted counts until the forward
                self._close(stream)
                continue
            leaving = sorted(luck.sample(stream.live, luck.choice((0, len(stream.live) // 2, len(stream.live)))))
            coming = luck.randint(1, min(room, 4))
            most = room + len(leaving) - coming
            self._begin(stream, coming, leaving, luck.randint(most // 2, most))
        self._forward()

    def _begin(self, stream: Paged, coming: int, leaving: list[int], ahead: int) -> None:
        evicted = Rows.where(np.isin(stream.live, leaving))
        if not stream.slots.has_room(coming, evicted, ahead):
            self._forward()
            while not stream.slots.has_room(coming, evicted, ahead):
                youngest = next(other for other in reversed(self.running) if not other.keeps)
                oldest = next(other for other in self.running if not other.keeps)
                assert youngest is not oldest, "alone with what is kept it has room"
                self._close(youngest)
                if youngest is stream:
                    return
        self._place(stream, coming, leaving, ahead)

    @precondition(lambda self: len(self.running) > 2)
    @rule(luck=st.randoms(use_true_random=False))
    def end(self, luck: Random) -> None:
        """A stream ends or is cancelled, wherever it is."""
        self._close(luck.choice(self.running))

    # --- as a plan and its forward do it ----------------------------------------------------------------------

    def _place(
        self, stream: Paged, coming: int, leaving: list[int], ahead: int, *, lead: bool = True, copy: bool = False
    ) -> None:
        dropped = stream.slots.drop(Rows.where(np.isin(stream.live, leaving)), coming)
        assert not len(dropped.source), "pages never move"
        stream.live = [token for token in stream.live if token not in leaving]
        self.freed.append((stream, dropped.freed))
        if lead:
            self.leader = stream, coming
            stream.add(coming)
        else:
            assert self.leader is not None
            leader, count = self.leader
            source, target = stream.slots.share(leader.slots, count, copy=copy)
            stream.live, stream.length = list(range(count)), count
            stream.slot_of |= enumerate(stream.slots.held.tolist())
            assert source.tolist() == (leader.slots.held.tolist() if copy else [])
            assert len(target) == len(source)
            assert not set(source.tolist()) & set(target.tolist())
        stream.slots.expect(ahead)
        stream.ahead, stream.in_turn = ahead, True
        self.planned.append(stream)

    def _forward(self) -> None:
        """What was evicted goes back; then the turns take what they may still need."""
        for stream, slots in self.freed:
            stream.slots.give_back(slots)
        self.freed = []
        for stream in self.planned:
            row = stream.slots.row(stream.ahead).tolist()
            assert row[: len(stream.live)] == stream.slots.held.tolist()
            assert len(row) == len(stream.live) + stream.ahead
            # More may be left of a turn that said less than it could.
            left = stream.ahead_slots
            stream.ahead_slots = row[len(stream.live) :]
            stream.ahead_slots += left[len(stream.ahead_slots) :]
        self.planned = []

    def _close(self, stream: Paged) -> None:
        assert stream not in self.planned
        stream.slots.close()
        self.running.remove(stream)

    # --- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def every_slot_is_free_or_has_its_holders(self) -> None:
        held = [slot for stream in self.running for slot in stream.holds]
        for stream in self.running:
            assert len(set(stream.holds)) == len(stream.holds), "nobody has a slot twice"
            assert stream.slots.owned == len(stream.holds)
            assert [stream.slot_of[token] for token in stream.live] == stream.slots.held.tolist()
        assert self.book.available == CAPACITY - len(set(held)), "free and held slots are all slots"
        for slot, holders in Counter(held).items():
            assert self.book.alone(np.array([slot])) == (holders == 1)

    @invariant()
    def what_is_kept_is_free(self) -> None:
        kept = [stream for stream in self.running if stream.keeps]
        assert self.book.kept == sum(stream.bound - len(stream.holds) for stream in kept)
        assert self.book.spare >= 0
        assert self.book.due == self.book.leaving == 0, "between two visits nothing is expected"
        slots = [slot for stream in kept for slot in stream.holds]
        assert self.book.alone(np.array(slots, np.int64)) == len(slots), "nobody shares what is kept"

    def teardown(self) -> None:
        for stream in list(self.running):
            self._close(stream)
        assert self.book.available == CAPACITY
        assert self.book.fits(CAPACITY, CAPACITY, keeps=True), "nothing stays promised"
        # Each slot once: the list of free ones has not been spoilt by what was shared.
        assert sorted(self.book.allocate(CAPACITY).tolist()) == list(range(CAPACITY))


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

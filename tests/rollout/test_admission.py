"""Admission alone, without a model: who runs fits, nobody is overtaken, and who is given back is the youngest."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine.admission import Admission
from rollout.engine.slots import BlockBook, PagedBook, StreamSlots
from streams.memory import Rows

CAPACITY, MAX_STREAMS = 20, 4


@dataclass(eq=False)
class Wanted:
    """As much of a stream as admission looks at."""

    id: str
    bound: int
    keeps: bool = True
    need: int = 0
    number: int = 0
    peak: int = 0
    finished: bool = False
    slots: StreamSlots = field(init=False)

    def __post_init__(self) -> None:
        self.need = self.need or self.bound


@pytest.mark.parametrize("book_type", [PagedBook, BlockBook])
@given(st.lists(st.one_of(st.integers(1, CAPACITY), st.sampled_from(["end first", "end last", "cancel"])), max_size=60))
def test_what_runs_fits_and_comes_in_the_order_in_which_it_was_queued(book_type, events):
    book = book_type(CAPACITY)
    admission, queued, admitted = Admission(book, MAX_STREAMS), [], []
    for number, event in enumerate(events):
        if isinstance(event, int):
            queued.append(Wanted(f"s{number}", event))
            admission.add(queued[-1])
        elif event == "cancel":
            gone = {stream.id for stream in queued[::3]}
            for stream in admission.cancel(gone):
                stream.slots.close()
                admission.release(stream)
            queued = [stream for stream in queued if stream.id not in gone]
        elif admission.running:
            ended = admission.running[0 if event == "end first" else -1]
            ended.slots.close()
            admission.release(ended)
            queued.remove(ended)
        before = list(admission.running)
        while admission.admit() is not None:
            pass
        assert admission.running[: len(before)] == before
        admitted += admission.running[len(before) :]
        assert sum(stream.bound for stream in admission.running) <= CAPACITY
        assert len(admission.running) <= MAX_STREAMS
        assert admission.running == queued[: len(admission.running)], "nobody is overtaken"
        waiting = queued[len(admission.running) :]
        room = CAPACITY - sum(stream.bound for stream in admission.running)
        if book_type is BlockBook:  # as one piece
            assert book.available == room
            room = max((n for n in range(1, CAPACITY + 1) if book.fits(n, n, keeps=True)), default=0)
        full = len(admission.running) == MAX_STREAMS or (waiting and waiting[0].bound > room)
        assert full or not waiting, "whoever fits, runs"
        assert not admission.possible
    assert [int(stream.id[1:]) for stream in admitted] == sorted(int(stream.id[1:]) for stream in admitted)
    admission.clear()
    book.clear()
    assert not admission.running
    admission.add(Wanted("whole", CAPACITY))
    assert admission.possible, "nothing stays reserved"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_on_pages_the_youngest_that_does_not_keep_its_bound_is_given_back_and_comes_again_first(seed):
    """Streams are admitted by what they need, and grow to their bound; where that is too much, the youngest go."""
    book = PagedBook(CAPACITY)
    luck = Random(seed)
    admission, alive, given_back = Admission(book, 2 * MAX_STREAMS), {}, []

    def end(stream):
        stream.slots.close()
        admission.release(stream)
        del alive[stream.id]

    def give_back():
        youngest = admission.youngest()
        loose = [stream for stream in admission.running if not stream.keeps]
        assert youngest is loose[-1]
        assert len(loose) > 1, "alone with what is kept it has room"
        again = Wanted(youngest.id, youngest.bound, False, min(youngest.bound, youngest.slots.owned + 1))
        youngest.slots.close()
        admission.give_back(youngest, again)
        alive[again.id] = again
        given_back.append(again.id)
        return youngest

    def grow(stream):
        """One token more, as far as its bound goes."""
        nothing = Rows()
        if stream.slots.owned == stream.bound:
            return
        while not stream.slots.has_room(1, nothing, 0):
            if give_back() is stream:
                return
        stream.slots.add(1)

    for number in range(60):
        event = luck.choice(["come"] * 4 + ["grow"] * 9 + ["end first", "end last", "cancel"])
        if event == "come":
            bound = luck.randint(4, 12)
            stream = Wanted(f"s{number}", bound, luck.random() < 0.2, luck.randint(1, 3))
            alive[stream.id] = stream
            admission.add(stream)
        elif event == "cancel" and luck.random() < 0.5:
            gone = set(list(alive)[::3])
            for stream in admission.cancel(gone):
                end(stream)
            alive = {name: stream for name, stream in alive.items() if name not in gone}
        elif event == "grow":
            for stream in list(admission.running):
                if stream in admission.running:
                    grow(stream)
        elif admission.running and event.startswith("end"):
            end(admission.running[0 if event == "end first" else -1])
        admitted = iter(admission.admit, None)
        for stream in admitted:
            assert stream.slots.has_room(stream.need, Rows(), 0)
            stream.slots.add(stream.need)
        numbers = [stream.number for stream in admission.running]
        assert numbers == sorted(numbers), "the oldest first"
        waiting = [stream for stream in alive.values() if stream not in admission.running]
        for stream in waiting:
            loose = [other.number for other in admission.running if not other.keeps]
            assert all(stream.number > number for number in loose), "nobody is overtaken but by what keeps its bound"
        kept = [stream for stream in admission.running if stream.keeps]
        assert book.kept == sum(stream.bound - stream.slots.owned for stream in kept) <= book.available
        assert len(admission.running) <= 2 * MAX_STREAMS
        assert not waiting or admission.running, "somebody runs"
    assert admission.take_preempted() == given_back
    assert admission.take_preempted() == []
    for stream in list(admission.running):
        end(stream)
    assert book.available == CAPACITY


def test_streams_are_expected_to_grow_as_those_did_that_have_ended():
    """Of bounds of 10, the one that has ended needed 6: beside three that may grow to 6, a pool of 20 has no room for more."""
    admission = Admission(PagedBook(20), 16)

    def come(names, **given):
        for name in names:
            admission.add(Wanted(name, 10, keeps=False, need=2, **given))
        for stream in iter(admission.admit, None):
            stream.slots.add(2)
        return [stream.id for stream in admission.running]

    def end(stream):
        stream.slots.close()
        admission.release(stream)

    assert come("abcdefghijk") == list("abcdefghij"), "nothing is known yet: as many as can begin"
    first, *others = admission.running
    first.peak, first.finished = 6, True
    end(first)
    for stream in others:  # cancelled: that says nothing
        stream.peak = 2
        end(stream)
    assert come("lmn") == ["k", "l", "m"]
    admission.running[0].slots.add(6)
    assert come("") == ["k", "l", "m"]
    end(admission.running[0])
    assert come("") == ["l", "m", "n"]
    for stream in list(admission.running):
        stream.peak, stream.finished = 10, True
        end(stream)
    assert come("op") == ["o", "p"], "9 each are expected now"
    assert come("q") == ["o", "p"]

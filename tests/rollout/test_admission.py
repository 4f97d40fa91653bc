"""Admission alone, without a model: streams that keep their bound never have more than the pool, and nobody is overtaken."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.engine.admission import Admission
from rollout.engine.slots import BlockBook, PagedBook, StreamSlots

CAPACITY, MAX_STREAMS = 20, 4


@dataclass(eq=False)
class Wanted:
    """As much of a stream as admission looks at."""

    id: str
    bound: int
    keeps: bool = True
    number: int = 0
    slots: StreamSlots = field(init=False)

    @property
    def need(self) -> int:
        return self.bound


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

"""Which streams wait and which run.

A stream is admitted when the slots are free that it needs now, those of its first turn, and those that it and the running
ones are expected to grow by: to the share of their bounds that streams which have ended needed, on average. Before the first
has ended nothing is expected. So the pool may run full; then the youngest is given back: its slots are free again, and it
waits to begin anew, from its seed. Streams that may not begin anew (`Stream.keeps`) wait until their whole bound is free,
keep it, and are never given back.

Invariants:
* streams are admitted in the order in which they came, those given back in the order of their first coming: a large one at
  the head is not overtaken;
* whoever is given back is the youngest of those that may be, so the oldest of them never is while another one runs;
* every stream ends. The oldest of those that may be given back is admitted in the end: whoever runs before it keeps its
  bound or is older, and ends. While it runs, its bound and all that is kept fit into the pool (`SlotBook.fits`, asked of
  whichever is opened later). A turn of it that finds no room has the younger ones given back, one by one; once it is alone
  with what is kept, there is room. So it goes on until it ends, and then the next one is the oldest;
* a stream that was given back waits for as many slots as it had, and one turn more: it comes further each time, and does not
  take turns with others at the brim.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Iterator

from rollout.engine.request import Stream
from rollout.engine.slots import SlotBook


def _age(stream: Stream) -> int:
    return stream.number


def _expected(stream: Stream, share: float) -> int:
    """Return how many slots a stream will come to need, if it needs this share of its bound."""
    return min(stream.bound, math.ceil(share * stream.bound))


REMEMBERED = 32
"""Streams that have ended, by which the growth of others is judged. Few: what a policy writes changes as it is trained."""


class Admission:
    """The queue of one engine. It opens the slots of streams that run; the engine closes them.

    Attributes:
        running: the oldest first.
        resting: those of them that are between two turns, or before their first; whoever begins and ends turns keeps it so.
    """

    def __init__(self, book: SlotBook, max_streams: int) -> None:
        """max_streams: streams that may run at once."""
        self._book, self._max_streams = book, max_streams
        self._waiting: deque[Stream] = deque()
        self._shares: deque[float] = deque(maxlen=REMEMBERED)
        self._came = 0
        self._preempted: list[str] = []
        self.running: list[Stream] = []
        self.resting: set[Stream] = set()

    @property
    def possible(self) -> bool:
        """Whether the stream at the head of the queue could run now."""
        if not self._waiting or len(self.running) >= self._max_streams:
            return False
        head = self._waiting[0]
        need = head.need
        if self._shares:
            share = sum(self._shares) / len(self._shares)
            growth = sum(max(0, _expected(s, share) - s.slots.owned) for s in self.running if not s.keeps)
            need = max(need, _expected(head, share)) + growth
        return self._book.fits(need, head.bound, keeps=head.keeps)

    def add(self, stream: Stream) -> None:
        stream.number = self._came
        self._came += 1
        self._waiting.append(stream)

    def admit(self) -> Stream | None:
        """Move the stream at the head of the queue to the running ones, if it fits; returns it."""
        if not self.possible:
            return None
        stream = self._waiting.popleft()
        stream.slots = self._book.open(stream.bound, keeps=stream.keeps)
        insort(self.running, stream, key=_age)
        self.resting.add(stream)
        return stream

    def between_turns(self) -> list[Stream]:
        """Return the resting ones, the oldest first."""
        return sorted(self.resting, key=_age)

    def due(self) -> Iterator[Stream]:
        """Yield the streams whose next turn is there, the oldest first, and then those that are admitted."""
        before = len(self._preempted)
        for stream in self.between_turns():
            # Those that were given back meanwhile are the youngest of the list.
            if stream in self.resting and stream.source.ready:
                yield stream
        # A pool that has just run full has no room for more.
        while len(self._preempted) == before and (admitted := self.admit()) is not None:
            if admitted.source.ready:
                yield admitted

    def take_preempted(self) -> list[str]:
        """Return the ids of the streams that were given back since the last call, once for each time."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def youngest(self) -> Stream:
        """Return the running stream that is given back first."""
        return next(stream for stream in reversed(self.running) if not stream.keeps)

    def give_back(self, stream: Stream, again: Stream) -> None:
        """Take the youngest out and put `again`, which is it from its beginning, where it came from.

        Its slots are the caller's to close.
        """
        self._leave(stream)
        again.number = stream.number
        self._preempted.append(stream.id)
        # Whoever waits came later, or was given back before as a younger one.
        self._waiting.appendleft(again)

    def release(self, stream: Stream) -> None:
        """Take a running stream out. Its slots are the caller's to close."""
        self._leave(stream)
        if stream.finished and not stream.keeps:
            self._shares.append(stream.peak / stream.bound)

    def cancel(self, stream_ids: set[str]) -> list[Stream]:
        """Forget these streams where they wait; return those of them that run."""
        self._waiting = deque(stream for stream in self._waiting if stream.id not in stream_ids)
        return [stream for stream in self.running if stream.id in stream_ids]

    def clear(self) -> None:
        """Forget every stream."""
        self._waiting.clear()
        self.running.clear()
        self.resting.clear()
        self._preempted.clear()

    def _leave(self, stream: Stream) -> None:
        self.running.remove(stream)
        self.resting.discard(stream)

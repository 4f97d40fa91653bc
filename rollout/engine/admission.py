"""Which streams wait and which run.

Invariants:
* a stream runs only with slots for the most that it may hold, so that no allocation can fail in a step;
* streams are admitted in the order in which they came: a large one at the head is not overtaken.
"""

from __future__ import annotations

from collections import deque

from rollout.engine.request import Stream
from rollout.engine.slots import SlotBook


class Admission:
    """The queue of one engine. It opens the slots of streams that run; the engine closes them."""

    def __init__(self, book: SlotBook, max_streams: int) -> None:
        """max_streams: streams that may run at once."""
        self._book, self._max_streams = book, max_streams
        self._waiting: deque[Stream] = deque()
        self.running: list[Stream] = []

    @property
    def possible(self) -> bool:
        """Whether the stream at the head of the queue could run now."""
        if not self._waiting or len(self.running) >= self._max_streams:
            return False
        return self._book.fits(self._waiting[0].reserved)

    def add(self, stream: Stream) -> None:
        self._waiting.append(stream)

    def admit(self) -> None:
        """Move streams from the queue to the running ones, as many as fit."""
        while self.possible:
            stream = self._waiting.popleft()
            stream.slots = self._book.open(stream.reserved)
            self.running.append(stream)

    def release(self, stream: Stream) -> None:
        """Take a running stream out. Its slots are the caller's to close."""
        self.running.remove(stream)

    def cancel(self, stream_ids: set[str]) -> list[Stream]:
        """Forget these streams where they wait; return those of them that run."""
        self._waiting = deque(stream for stream in self._waiting if stream.id not in stream_ids)
        return [stream for stream in self.running if stream.id in stream_ids]

    def clear(self) -> None:
        """Forget every stream."""
        self._waiting.clear()
        self.running.clear()

"""Which streams wait and which run.

Invariants:
* the running streams together never reserve more slots than the pool has, so that no allocation can fail in a step;
* streams are admitted in the order in which they came: a large one at the head is not overtaken.
"""

from __future__ import annotations

from collections import deque

from tests.support.one_step.request import Stream


class Admission:
    """The queue of one engine. It counts slots; it does not allocate or free them."""

    def __init__(self, capacity: int, max_streams: int) -> None:
        """capacity: slots of the pool. max_streams: streams that may run at once."""
        self._capacity, self._max_streams = capacity, max_streams
        self._waiting: deque[Stream] = deque()
        self._reserved = 0
        self.running: list[Stream] = []

    @property
    def possible(self) -> bool:
        """Return whether the stream at the head of the queue could run now."""
        room = self._capacity - self._reserved
        return bool(self._waiting) and len(self.running) < self._max_streams and self._waiting[0].reserved <= room

    def add(self, stream: Stream) -> None:
        self._waiting.append(stream)

    def admit(self) -> None:
        """Move streams from the queue to the running ones, as many as fit."""
        while self.possible:
            stream = self._waiting.popleft()
            self._reserved += stream.reserved
            self.running.append(stream)

    def release(self, stream: Stream) -> None:
        """Remove a running stream and give up its reservation. The caller frees its slots."""
        self.running.remove(stream)
        self._reserved -= stream.reserved

    def cancel(self, stream_ids: set[str]) -> list[Stream]:
        """Forget those of these streams that wait; return those that run."""
        self._waiting = deque(stream for stream in self._waiting if stream.id not in stream_ids)
        return [stream for stream in self.running if stream.id in stream_ids]

    def clear(self) -> None:
        """Forget every stream."""
        self._waiting.clear()
        self.running.clear()
        self._reserved = 0

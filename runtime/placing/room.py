"""Which seats have room on a node, as Ray said last: asked in a thread, so that whoever looks waits for nothing.

Invariants:
* without a GCS, which never answers, nobody but the thread waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

POLL_S = 2.0
"""How often Ray is asked, at most."""


class RoomWatch:
    """without: the seats that had no room when Ray was asked last."""

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        self._has_room = has_room
        self.without: frozenset[int] = frozenset()
        self._looked = 0.0
        self._asking = threading.Thread(target=self.ask, args=((),))

    def look(self, seats: Collection[int]) -> None:
        """Have Ray asked about these seats, now and then."""
        if time.monotonic() - self._looked >= POLL_S and not self._asking.is_alive():
            self._looked = time.monotonic()
            self._asking = threading.Thread(target=self.ask, args=(seats,), name="room", daemon=True)
            self._asking.start()

    def ask(self, seats: Collection[int]) -> None:
        """Ask Ray about these seats, and wait for the answer."""
        self.without = frozenset(seat for seat in seats if not self._has_room(seat))

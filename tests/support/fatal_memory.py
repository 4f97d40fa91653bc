"""A memory policy that ends the process of a stream that lasts longer than its fellows."""

from __future__ import annotations

import os

import numpy as np

from streams.memory import LiveTokens, MemoryPolicy, TurnStart, old_video


class Fatal(MemoryPolicy):
    """Video of the last `window` chunks, and no turn after `last`."""

    def __init__(self, window: int = 4, last: int = 7) -> None:
        self.window, self.last = window, last

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        if start.turn > self.last:
            os.abort()
        return old_video(live, start, self.window)

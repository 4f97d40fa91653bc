"""A memory policy of your own: docs/memory.md explains it."""

import numpy as np

from streams.log.record import Kind
from streams.memory import LiveTokens, MemoryPolicy, TurnStart, old_text, old_video


class KeepAnswers(MemoryPolicy):
    """Video of the last `window` chunks; text of the last `turns` turns, and of all turns that answered something."""

    def __init__(self, window: int = 8, turns: int = 16) -> None:
        if turns < 1:
            raise ValueError(f"turns={turns} must be at least 1")
        self.window, self.text_window = window, turns

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        answered = np.unique(live.turn[live.kind == Kind.RESPONSE])
        text = old_text(live, start, self.text_window) & ~np.isin(live.turn, answered)
        return text | old_video(live, start, self.window)

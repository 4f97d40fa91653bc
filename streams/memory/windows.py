"""Memory by windows of whole turns: full, rcsm, recent_frames.

Sources: rcsm is ThinkStream's Reasoning-Compressed Streaming Memory (arXiv 2603.12938); recent_frames is
the SimpleStream baseline (recent chunks, nothing else).
"""

from __future__ import annotations

from streams.memory.policy import LiveTokens, MemoryPolicy, TurnStart, old_rows, text_begins, video_begins
from streams.memory.rows import Rows


class Full(MemoryPolicy):
    """Everything stays."""

    def leaving(self, live: LiveTokens, start: TurnStart) -> Rows:
        return Rows()

    @property
    def words(self) -> str:
        return "everything"


class Rcsm(MemoryPolicy):
    """Video of the last `window` video turns; all text, or (text_window > 0) that of the last `text_window` turns."""

    def __init__(self, window: int, text_window: int = 0) -> None:
        self.window: int = window
        self.text_window = text_window or None

    def leaving(self, live: LiveTokens, start: TurnStart) -> Rows:
        text = 0 if self.text_window is None else text_begins(start, self.text_window)
        return Rows(old_rows(live, video_begins(start, self.window), text))

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        # One more turn than each window: slots of evicted tokens are freed after the forward that replaces them.
        text_turns = turns if self.text_window is None else min(turns, self.text_window + 1)
        video_turns = min(turns, self.window) + 1
        return fixed + text_turns * (per_turn - video_per_turn) + video_turns * video_per_turn

    @property
    def words(self) -> str:
        text = "all text" if self.text_window is None else f"text of the last {self.text_window} turns"
        return f"video of the last {self.window} chunks, {text}"


class RecentFrames(MemoryPolicy):
    """The last `window` turns and nothing else but the system prompt and open queries."""

    def __init__(self, window: int) -> None:
        self.window: int = window
        self.text_window: int = window

    def leaving(self, live: LiveTokens, start: TurnStart) -> Rows:
        return Rows(old_rows(live, video_begins(start, self.window), text_begins(start, self.text_window)))

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        return fixed + (min(turns, self.window) + 1) * per_turn

    @property
    def words(self) -> str:
        return f"video of the last {self.window} chunks and their text"

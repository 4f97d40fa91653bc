"""sink_window: recent turns, and the beginning and the end of older generated text.

With native positions, kept tokens keep the positions that they were rotated with. With contiguous ones, as in StreamingVLM,
they are re-indexed once per turn, by the regions that `regions` returns.

Sources: StreamingLLM (arXiv 2309.17453) and StreamingVLM (arXiv 2510.09608), whose inference keeps 16 vision turns, 16 text
turns, 512 sink and 512 tail tokens.
"""

from __future__ import annotations

import numpy as np

from streams.log.record import GENERATED_TEXT, Kind
from streams.memory.policy import LiveTokens, MemoryPolicy, TurnStart, old_text, old_video
from streams.positions.regions import Region


class SinkWindow(MemoryPolicy):
    """Video of the last `window` video turns, text of the last `text_window` turns; of generated text before those, the
    stream's first `sink_tokens` and the last `tail_tokens`.
    """

    def __init__(self, window: int, text_window: int, sink_tokens: int, tail_tokens: int) -> None:
        if text_window < 1:
            raise ValueError(f"text_window={text_window} must be at least 1 (the turn being watched)")
        self.window: int = window
        self.text_window: int = text_window
        self.sink_tokens, self.tail_tokens = sink_tokens, tail_tokens

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        leaving = old_video(live, start, self.window)
        leaving |= old_text(live, start, self.text_window, (Kind.SCAFFOLD, Kind.QUERY, Kind.END))
        # Generated tokens of the turns that have left the text window: the tail is counted from their end.
        older = start.generated[max(0, start.turn - self.text_window + 1)]
        between = (live.ordinal >= self.sink_tokens) & (live.ordinal < older - self.tail_tokens)
        return leaving | old_text(live, start, self.text_window, GENERATED_TEXT) & between

    def regions(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        region = np.full(len(live), Region.RETAINED, np.int8)
        # Turns up to the latest one whose video was evicted. A later turn without video waits for the video before it.
        shown = start.video_turns[start.turn] + start.has_video
        region[start.video_turns[live.turn] < shown - self.window] = Region.TEXT
        old = live.turn <= start.turn - self.text_window
        region[old & (live.ordinal >= 0)] = Region.TAIL
        region[old & (live.ordinal >= 0) & (live.ordinal < self.sink_tokens)] = Region.SINK
        region[old & (live.kind == Kind.QUERY)] = Region.PINNED
        region[live.kind == Kind.SYSTEM] = Region.SYSTEM
        return region

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        # A turn that falls out of the text window pushes at most its own number of tokens out of the tail.
        text = per_turn - video_per_turn
        kept = (min(turns, self.text_window) + 1) * text + self.sink_tokens + self.tail_tokens
        return fixed + min(kept, turns * text) + min(turns, self.window + 1) * video_per_turn

    @property
    def words(self) -> str:
        return (
            f"video of the last {self.window} chunks, text of the last {self.text_window} turns, of older generated text "
            f"{self.sink_tokens} sink and {self.tail_tokens} tail tokens"
        )

"""sink_window: recent turns, and the beginning and the end of older generated text.

With native positions, kept tokens keep the positions that they were rotated with. With contiguous ones, as in StreamingVLM,
they are re-indexed once per turn, by the regions that `regions` returns.

Sources: StreamingLLM (arXiv 2309.17453) and StreamingVLM (arXiv 2510.09608), whose inference keeps 16 vision turns, 16 text
turns, 512 sink and 512 tail tokens.
"""

from __future__ import annotations

import numpy as np

from streams.log.record import Kind
from streams.memory.policy import (
    LiveTokens,
    MemoryPolicy,
    TurnStart,
    number,
    old_rows,
    text_begins,
    tokens_before,
    video_begins,
)
from streams.memory.rows import Rows
from streams.positions.regions import Region

# numpy takes members of an IntEnum, but several times as long as plain numbers.
_RETAINED, _QUERY, _SYSTEM = int(Region.RETAINED), int(Kind.QUERY), int(Kind.SYSTEM)


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
        text = (Kind.SCAFFOLD, Kind.QUERY, Kind.END)
        begins = text_begins(start, self.text_window)
        leaving = Rows(old_rows(live, video_begins(start, self.window), begins, text)).mask(len(live))
        # Generated tokens of the turns that have left the text window: the tail is counted from their end. The ordinal of any
        # other token is -1, which is in no window.
        ordinal = live.ordinal[: tokens_before(live, begins)]
        between = (ordinal >= self.sink_tokens) & (ordinal < int(start.generated[begins]) - self.tail_tokens)
        leaving[: len(between)] |= between
        return leaving

    def regions(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        region = np.full(len(live), _RETAINED, np.int8)
        # Turns up to the latest one whose video was evicted. A later turn without video waits for the video before it.
        shown = int(start.video_turns[start.turn]) + start.has_video
        unseen = int(start.video_turns.searchsorted(number(shown - self.window)))
        region[: tokens_before(live, unseen)] = Region.TEXT
        old = tokens_before(live, text_begins(start, self.text_window))
        kind, ordinal = live.kind[:old], live.ordinal[:old]
        region[:old][ordinal >= 0] = Region.TAIL
        region[:old][(ordinal >= 0) & (ordinal < self.sink_tokens)] = Region.SINK
        region[:old][kind == _QUERY] = Region.PINNED
        first = tokens_before(live, 1)
        region[:first][live.kind[:first] == _SYSTEM] = Region.SYSTEM
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

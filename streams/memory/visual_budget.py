"""visual_budget: as many of the latest chunks as fit into a number of video tokens.

For chunks of uneven size, where a window of turns would not bound memory. Chunks are evicted whole, oldest first.
"""

from __future__ import annotations

import numpy as np

from streams.log.record import Kind
from streams.memory.policy import LiveTokens, MemoryPolicy, TurnStart

_VIDEO = int(Kind.VIDEO)  # numpy takes members of an IntEnum, but several times as long as plain numbers


class VisualBudget(MemoryPolicy):
    """At most `video_tokens` video tokens, those of the starting turn included; all text."""

    def __init__(self, video_tokens: int) -> None:
        if video_tokens < 1:
            raise ValueError(f"video_tokens={video_tokens} must be at least the video tokens of one chunk")
        self.video_tokens = video_tokens

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        video = (live.kind == _VIDEO).nonzero()[0]
        leaving = np.zeros(len(live), bool)
        over = len(video) + start.video_tokens - self.video_tokens
        if over > 0 and len(video):
            turns = live.turn[video]
            # The oldest `over` tokens must go, and the rest of the last one's chunk with it.
            last = turns[min(over, len(video)) - 1]
            leaving[video[: turns.searchsorted(last, side="right")]] = True
        return leaving

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        if video_per_turn > self.video_tokens:
            raise ValueError(
                f"memory.video_tokens={self.video_tokens} cannot hold one chunk of {video_per_turn} video tokens: raise it, "
                "or lower data.video.max_pixels or data.video.frames_per_chunk"
            )
        # Evicted slots are freed after the next forward: the budget, and the chunk that comes.
        video = min(turns * video_per_turn, self.video_tokens + video_per_turn)
        return fixed + turns * (per_turn - video_per_turn) + video

    @property
    def words(self) -> str:
        return f"the latest chunks of up to {self.video_tokens} video tokens, all text"

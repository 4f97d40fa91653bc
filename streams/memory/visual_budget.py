"""visual_budget: as many of the latest chunks as fit into a number of video tokens.

For chunks of uneven size, where a window of turns would not bound memory. Chunks are evicted whole, oldest first.
"""

from __future__ import annotations

from streams.log.record import Kind
from streams.memory.policy import LiveTokens, MemoryPolicy, TurnStart
from streams.memory.rows import Range, Rows, add_range

_VIDEO = int(Kind.VIDEO)  # numpy takes members of an IntEnum, but several times as long as plain numbers


class VisualBudget(MemoryPolicy):
    """At most `video_tokens` video tokens, those of the starting turn included; all text."""

    def __init__(self, video_tokens: int) -> None:
        if video_tokens < 1:
            raise ValueError(f"video_tokens={video_tokens} must be at least the video tokens of one chunk")
        self.video_tokens = video_tokens

    def leaving(self, live: LiveTokens, start: TurnStart) -> Rows:
        held = sum(size for _, (kind, _, size) in live.runs if kind == _VIDEO)
        over = held + start.video_tokens - self.video_tokens
        ranges: list[Range] = []
        row, last = 0, -1
        for block, (kind, _, size) in live.runs:
            # The oldest `over` tokens must go, and the rest of the last one's chunk with it.
            if kind == _VIDEO and (over > 0 or block.turn == last):
                add_range(ranges, row, row + size)
                over -= size
                last = block.turn
            row += size
        return Rows(ranges)

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

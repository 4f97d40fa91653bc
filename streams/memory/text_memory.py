"""text_memory: the current chunk, and as text what was asked, thought and said before it.

One log in two lanes: lane 0 is the memory, lane 1 the turn that is being watched.

Source: VST (arXiv 2603.12262), which prompts anew at every clip with its memory of thoughts.
"""

from __future__ import annotations

from streams.layout.lanes import Lanes
from streams.log.record import Kind
from streams.memory.policy import LiveTokens, MemoryPolicy, TurnStart
from streams.memory.rows import Range, Rows, add_range

STAYS = (Kind.SYSTEM, Kind.QUERY, Kind.MEMORY)


class TextMemory(MemoryPolicy):
    """Evict everything of a turn except its query and the copy of its thought and answer."""

    lanes = Lanes.MEMORY

    def leaving(self, live: LiveTokens, start: TurnStart) -> Rows:
        ranges: list[Range] = []
        row = 0
        for _, (kind, _, size) in live.runs:
            if kind not in STAYS:
                add_range(ranges, row, row + size)
            row += size
        return Rows(ranges)

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        # Slots of an evicted turn are freed after the forward of the next one.
        return fixed + min(turns, 2) * per_turn

    @property
    def words(self) -> str:
        return "the chunk being watched, every query, of earlier turns a copy of thought and answer"

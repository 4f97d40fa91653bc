"""What a memory policy is: it looks at the live tokens before a turn's first segment and names those that leave.

The writer lowers the expiry of those tokens to that segment's start. Rule of every policy: eviction precedes
prefill; windows include the turn that starts; video windows count video turns, text windows count every turn; an open
query is pinned, whatever the policy says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from streams.layout.lanes import Lanes
from streams.log.record import Kind
from streams.memory.blocks import LiveTokens
from streams.memory.rows import Range, Rows, add_range

# As plain numbers: those are looked up several times as fast as members of an IntEnum.
TURN_TEXT = tuple(int(kind) for kind in (Kind.SCAFFOLD, Kind.QUERY, Kind.THINK, Kind.DECISION, Kind.RESPONSE, Kind.END))
"""All text of a turn. Listing QUERY is safe: while it is open it stays."""
_VIDEO = int(Kind.VIDEO)  # numpy takes members of an IntEnum, but several times as long as plain numbers
NATIVE, CONTIGUOUS = "native", "contiguous"
POSITIONS = (NATIVE, CONTIGUOUS)


class TurnStart(NamedTuple):
    """What a policy may know when turn `turn` starts.

    has_video: whether it shows a chunk; video_tokens: how many tokens of it. video_turns, generated int32 [turn + 1]: number
    of video turns, and of generated text tokens, before each turn, the starting one included as last entry. closed_in
    int32 [turn]: for the query of each earlier turn the turn that closed it; NEVER while open or where there was none.
    asked: whether a query may be open.
    """

    turn: int
    has_video: bool
    video_tokens: int
    video_turns: np.ndarray
    generated: np.ndarray
    closed_in: np.ndarray
    asked: bool = True


class MemoryPolicy(ABC):
    """One per stream; its constructor takes the knobs. What it decides may only depend on them and on its arguments.

    window: video turns whose video stays; text_window: turns whose scaffold stays; None = not bounded that way. lanes: how
    its turns are spread over the two lanes. positions: `native`, or `contiguous` for a policy with regions (set from
    memory.positions when the policy is made).
    """

    window: int | None = None
    text_window: int | None = None
    lanes: Lanes = Lanes.ONE
    positions: str = NATIVE

    @abstractmethod
    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray | Rows:
        """bool [n] over the live tokens: True where the token expires at the start of this turn. Or those rows, as ranges."""

    def regions(self, live: LiveTokens, start: TurnStart) -> np.ndarray | None:
        """int8 [n]: the Region of each token that stays (`live`) from this turn on; None: the policy has no regions.

        Asked after `leaving`, only with contiguous positions. A token may stay where it is (at first Region.RETAINED) or move
        to a region before; the policy's own choice of when, as long as what it lets go leaves a region from its old end.
        """
        return None

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        """Upper bound of a stream's tokens in the KV pool, from its largest turn: live, or evicted in the running step.

        per_turn: with its video. fixed: system prompt and every query (all may be pinned at once); with Lanes.MEMORY the
        copies of all turns, too. It sizes the pool's reservation. Raises ValueError, with the config key, if turns of this
        size cannot be held. Here: nothing leaves.
        """
        return fixed + turns * per_turn

    def lane_one_begins(self, lane0: int, lane1: int) -> int:
        """First position of a turn's part in lane 1; where both lanes' counters stand. Here: behind lane 0, every turn anew."""
        return lane0

    @property
    def words(self) -> str:
        """What stays, for people; empty: the name says it."""
        return ""


def old_rows(live: LiveTokens, video_before: int, text_before: int, kinds: tuple[int, ...] = TURN_TEXT) -> list[Range]:
    """Return the rows of the video of turns before one, and of the text of these kinds of turns before another."""
    ranges: list[Range] = []
    row, last = 0, max(video_before, text_before)
    for block in live.blocks:
        turn = block.turn
        if turn >= last:  # turns never decrease
            break
        video, text = turn < video_before, turn < text_before
        for kind, _, size in block.runs:
            if video if kind == _VIDEO else text and kind in kinds:
                add_range(ranges, row, row + size)
            row += size
    return ranges


def video_begins(start: TurnStart, window: int) -> int:
    """Return the first turn whose video is of the last `window` video turns. A turn without video moves nothing."""
    if not start.has_video:
        return 0
    # `window` or more video turns have passed since every turn before it.
    enough = number(int(start.video_turns[start.turn]) - window)
    return int(start.video_turns.searchsorted(enough, side="right"))


def text_begins(start: TurnStart, window: int) -> int:
    """Return the first of the last `window` turns."""
    return max(0, start.turn - window + 1)


def old_video(live: LiveTokens, start: TurnStart, window: int) -> np.ndarray:
    """bool [n]: video that is not of the last `window` video turns. A turn without video moves nothing."""
    return Rows(old_rows(live, video_begins(start, window), 0)).mask(len(live))


def old_text(live: LiveTokens, start: TurnStart, window: int, kinds: tuple[int, ...] = TURN_TEXT) -> np.ndarray:
    """bool [n]: tokens of these kinds that are not of the last `window` turns."""
    return Rows(old_rows(live, 0, text_begins(start, window), kinds)).mask(len(live))


def tokens_before(live: LiveTokens, turn: int) -> int:
    """Return how many of the live tokens are of turns before this one; they come first, as turns never decrease."""
    return int(live.turn.searchsorted(number(turn)))


def number(value: int) -> np.int32:
    """Return what to search a column for: in the column's own dtype, as with any other it is converted first. At least -1."""
    return np.int32(max(-1, value))

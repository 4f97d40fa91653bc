"""Memory policies: which tokens of a stream expire when the next turn starts.

Owner: streams. A policy looks at the live tokens before a turn's first segment and names those that leave; the
writer lowers their expiry to that segment's start. Rule of every policy: eviction precedes prefill; windows include
the turn that starts; video windows count video turns, text windows count every turn; an open query is pinned.
Sources: rcsm is ThinkStream's Reasoning-Compressed Streaming Memory (arXiv 2603.12938); recent_frames is the
SimpleStream baseline (recent chunks, nothing else).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from streams.log import Kind

_TEXT_KINDS = (Kind.SCAFFOLD, Kind.THINK, Kind.DECISION, Kind.RESPONSE, Kind.END)


@dataclass(frozen=True)
class MemoryConfig:
    """`memory=NAME` of the Hydra config; `window` is W in chunks (unused by `full`)."""

    name: str = "rcsm"
    window: int = 20

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ValueError(f"memory.name={self.name!r} is not one of {', '.join(sorted(POLICIES))}")
        if self.window < 1:
            raise ValueError(f"memory.window={self.window} must be at least 1 (the chunk being watched)")


@dataclass(frozen=True)
class LiveTokens:
    """The live tokens of a stream, in log order: kind int8 [n], turn int32 [n]."""

    kind: np.ndarray
    turn: np.ndarray


@dataclass(frozen=True)
class TurnStart:
    """What a policy may know when turn `turn` starts.

    video_turns: int32 [turn + 1], number of video turns before each turn, the starting one included as last entry.
    has_video: whether the starting turn shows a chunk. closed_in: int32 [turn], for the query of each earlier turn the
    turn that closed it; NEVER while open or where there was none.
    """

    turn: int
    has_video: bool
    video_turns: np.ndarray
    closed_in: np.ndarray


class MemoryPolicy(ABC):
    """Names the tokens that leave before a turn. `text_window` is None where text is kept for ever."""

    window: int | None = None
    text_window: int | None = None

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        """bool [n] over the live tokens: True where the token expires at the start of this turn."""
        leaving = np.zeros(len(live.kind), bool)
        if self.window is not None and start.has_video:
            age = start.video_turns[start.turn] - start.video_turns[live.turn]
            leaving |= (live.kind == Kind.VIDEO) & (age >= self.window)
        if self.text_window is not None:
            old = live.turn <= start.turn - self.text_window
            leaving |= old & np.isin(live.kind, _TEXT_KINDS)
            closed = start.closed_in[np.minimum(live.turn, start.turn - 1)] < start.turn if start.turn else False
            leaving |= old & (live.kind == Kind.QUERY) & closed
        return leaving

    @abstractmethod
    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        """Upper bound of live tokens of a stream, from the largest turn; sizes the KV pool's reservation."""


class Full(MemoryPolicy):
    """Everything stays."""

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        return fixed + turns * per_turn


class Rcsm(MemoryPolicy):
    """Video of the last `window` video turns; all text stays."""

    def __init__(self, window: int) -> None:
        self.window = window

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        # One more video turn than the window: slots of evicted tokens are freed after the forward that replaces them.
        return fixed + turns * (per_turn - video_per_turn) + (min(turns, self.window or 0) + 1) * video_per_turn


class RecentFrames(MemoryPolicy):
    """The last `window` turns and nothing else but the system prompt and open queries."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.text_window = window

    def max_live_tokens(self, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
        # `fixed` counts the system prompt and every query, which may all be pinned at once.
        return fixed + (min(turns, self.window or 0) + 1) * per_turn


POLICIES: dict[str, type[MemoryPolicy]] = {"full": Full, "rcsm": Rcsm, "recent_frames": RecentFrames}


def make_policy(config: MemoryConfig) -> MemoryPolicy:
    policy = POLICIES[config.name]
    return policy() if config.name == "full" else policy(config.window)  # type: ignore[call-arg]


def knobs(config: MemoryConfig) -> tuple[tuple[str, int], ...]:
    """The policy's settings as they are written into a log header."""
    return () if config.name == "full" else (("window", config.window),)


__all__ = ["POLICIES", "LiveTokens", "MemoryConfig", "MemoryPolicy", "TurnStart", "knobs", "make_policy"]

"""What a memory policy is: it looks at the live tokens before a turn's first segment and names those that leave.

The writer lowers the expiry of those tokens to that segment's start. Rule of every policy: eviction precedes
prefill; windows include the turn that starts; video windows count video turns, text windows count every turn; an open
query is pinned, whatever the policy says.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams.lanes import Lanes
from streams.log import Kind
from streams.regions import Region

TURN_TEXT = (Kind.SCAFFOLD, Kind.QUERY, Kind.THINK, Kind.DECISION, Kind.RESPONSE, Kind.END)
"""All text of a turn. Listing QUERY is safe: while it is open it stays."""
NATIVE, CONTIGUOUS = "native", "contiguous"
POSITIONS = (NATIVE, CONTIGUOUS)


@dataclass(frozen=True)
class LiveTokens:
    """The live tokens of a stream, in log order; all [n].

    kind int8. turn int32. ids int32. index int64: place in the log. ordinal int64: place among the generated text (thoughts,
    decisions, responses) of the whole stream, -1 for any other token.
    """

    kind: np.ndarray
    turn: np.ndarray
    ids: np.ndarray
    index: np.ndarray
    ordinal: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class TurnStart:
    """What a policy may know when turn `turn` starts.

    has_video: whether it shows a chunk; video_tokens: how many tokens of it. video_turns, generated int64 [turn + 1]: number
    of video turns, and of generated text tokens, before each turn, the starting one included as last entry. closed_in
    int64 [turn]: for the query of each earlier turn the turn that closed it; NEVER while open or where there was none.
    """

    turn: int
    has_video: bool
    video_tokens: int
    video_turns: np.ndarray
    generated: np.ndarray
    closed_in: np.ndarray


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
    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        """bool [n] over the live tokens: True where the token expires at the start of this turn."""

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


def old_video(live: LiveTokens, start: TurnStart, window: int) -> np.ndarray:
    """bool [n]: video that is not of the last `window` video turns. A turn without video moves nothing."""
    if not start.has_video:
        return np.zeros(len(live), bool)
    age = start.video_turns[start.turn] - start.video_turns[live.turn]
    return (live.kind == Kind.VIDEO) & (age >= window)


def old_text(live: LiveTokens, start: TurnStart, window: int, kinds: tuple[Kind, ...] = TURN_TEXT) -> np.ndarray:
    """bool [n]: tokens of these kinds that are not of the last `window` turns."""
    return (live.turn <= start.turn - window) & np.isin(live.kind, kinds)


def evicted(policy: MemoryPolicy, live: LiveTokens, start: TurnStart) -> np.ndarray:
    """bool [n]: what the policy lets go, open queries excepted. Raises ValueError for an answer that is no such array."""
    leaving = _asked(policy.leaving, f" in turn {start.turn}", live, start)
    if not isinstance(leaving, np.ndarray) or leaving.dtype != np.bool_ or leaving.shape != (len(live),):
        given = f"{leaving.dtype} {list(leaving.shape)}" if isinstance(leaving, np.ndarray) else repr(leaving)
        raise ValueError(
            f"memory: {type(policy).__name__}.leaving returned {given} in turn {start.turn}; it must be an array of bool, "
            f"one for each of the {len(live)} live tokens"
        )
    query = live.kind == Kind.QUERY
    pinned = np.zeros(len(live), bool)
    pinned[query] = start.closed_in[live.turn[query]] >= start.turn
    return leaving & ~pinned


def placed(policy: MemoryPolicy, live: LiveTokens, start: TurnStart, before: np.ndarray) -> np.ndarray:
    """int8 [n]: the region of each live token that stays, as the policy says; before: as they are now. Raises ValueError."""
    region = _asked(policy.regions, f" in turn {start.turn}", live, start)
    name = f"memory: {type(policy).__name__}.regions"
    if not isinstance(region, np.ndarray) or region.dtype != np.int8 or region.shape != (len(live),):
        given = f"{region.dtype} {list(region.shape)}" if isinstance(region, np.ndarray) else repr(region)
        raise ValueError(
            f"{name} returned {given} in turn {start.turn}; with memory.positions={CONTIGUOUS} it must be an array of int8, "
            f"one Region for each of the {len(live)} tokens that stay"
        )
    wrong = np.flatnonzero((region < 0) | (region > before))
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"{name} puts token {live.index[at]} into region {region[at]} in turn {start.turn}, it was in {before[at]} "
            f"({Region(int(before[at])).name}): a token stays where it is or moves to a region before"
        )
    return region


def live_bound(policy: MemoryPolicy, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
    """What the policy's max_live_tokens says. Raises ValueError: the policy's own, and for an answer that is no number."""
    sizes = {"per_turn": per_turn, "fixed": fixed, "video_per_turn": video_per_turn, "turns": turns}
    bound = _asked(policy.max_live_tokens, "", refuses=True, **sizes)
    if not isinstance(bound, int | np.integer) or bound < 1:
        raise ValueError(
            f"memory: {type(policy).__name__}.max_live_tokens returned {bound!r} for {sizes}; it must be a whole number of "
            "tokens, at least 1"
        )
    return int(bound)


def lane_one_start(policy: MemoryPolicy, lane0: int, lane1: int) -> int:
    """What the policy's lane_one_begins says. Raises ValueError for an answer that is no position."""
    first = _asked(policy.lane_one_begins, "", lane0, lane1)
    if not isinstance(first, int | np.integer) or first < 0:
        raise ValueError(
            f"memory: {type(policy).__name__}.lane_one_begins returned {first!r} for ({lane0}, {lane1}); it must be a "
            "position, a whole number of at least 0"
        )
    return int(first)


def _asked(method: Callable[..., Any], when: str, *args: Any, refuses: bool = False, **named: Any) -> Any:
    """What a policy's method answers. It may be a user's: whatever it raises is a ValueError that says where; with
    `refuses`, a ValueError is an answer, too.
    """
    try:
        return method(*args, **named)
    except Exception as error:  # named boundary: a user's code
        if refuses and isinstance(error, ValueError):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"memory: {method.__qualname__} raised {type(error).__name__}{when}: {error} ({where.filename}:{where.lineno})"
        ) from error


def check_contiguous(policy: MemoryPolicy, name: str) -> None:
    """Raises ValueError, with the key, if the policy called `name` cannot have contiguous positions."""
    if type(policy).regions is MemoryPolicy.regions:
        raise ValueError(
            f"memory.positions={CONTIGUOUS} with memory.name={name}: this policy has no regions to lay out one after the "
            f"other; choose memory=sink_window or memory.positions={NATIVE}, or give a policy of your own a method regions"
        )
    if policy.lanes is not Lanes.ONE:
        raise ValueError(
            f"memory.positions={CONTIGUOUS} with memory.name={name}: its turns stand in two lanes with position counters of "
            f"their own; use memory.positions={NATIVE}"
        )
    text, video = policy.text_window, policy.window
    if text is not None and (video is None or text < video):
        kept = "all" if video is None else f"memory.window={video}"
        raise ValueError(
            f"memory.positions={CONTIGUOUS}: text stays for memory.text_window={text} turns but video for {kept}: a turn's "
            "text would leave a hole in front of its video; give text at least the window of video"
        )


def check_text_tells_time(policy: MemoryPolicy, timestamps: bool) -> None:
    """Raises ValueError if text would leave before the video whose time it tells (exact all the same, but senseless).

    timestamps: whether the backbone writes the time of a chunk as text.
    """
    text, video = policy.text_window, policy.window
    if timestamps and text is not None and (video is None or text < video):
        kept = "all" if video is None else f"memory.window={video}"
        raise ValueError(
            f"memory: text stays for {text} turns (memory.text_window) but video for {kept}: this backbone tells the time "
            "of a chunk in text before it, which must stay as long as the chunk; give text at least the window of video"
        )

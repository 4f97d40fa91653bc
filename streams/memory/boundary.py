"""The guards around a policy, which may be a user's class: what it answers is checked before anybody uses it.

Invariant: whatever a policy raises or returns wrongly is a ValueError that names the policy, its method and the turn.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from streams.layout.lanes import Lanes
from streams.log.record import Kind
from streams.memory.policy import CONTIGUOUS, NATIVE, LiveTokens, MemoryPolicy, TurnStart
from streams.memory.rows import Range, Rows, add_range
from streams.positions.regions import Region

_QUERY = int(Kind.QUERY)  # numpy takes members of an IntEnum, but several times as long as plain numbers


def evicted(policy: MemoryPolicy, live: LiveTokens, start: TurnStart) -> Rows:
    """Return the rows of what the policy evicts; open queries stay.

    Raises ValueError for an answer that is neither bool [n] nor rows of live tokens.
    """
    rows = _call(policy.leaving, start, live, start)
    if not isinstance(rows, Rows):
        if not isinstance(rows, np.ndarray) or rows.dtype != np.bool_ or rows.shape != (len(live),):
            given = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else repr(rows)
            raise ValueError(
                f"memory: {type(policy).__name__}.leaving returned {given} in turn {start.turn}; it must be an array of "
                f"bool, one for each of the {len(live)} live tokens, or their Rows"
            )
        rows = Rows.where(rows)
    elif rows.ranges and not _ascend(rows.ranges, len(live)):
        raise ValueError(
            f"memory: {type(policy).__name__}.leaving returned {rows} in turn {start.turn}; its ranges must ascend, apart "
            f"from each other, within the {len(live)} live tokens"
        )
    return _without_open_queries(rows, live, start) if start.asked and rows.ranges else rows


def _ascend(ranges: Sequence[Range], n: int) -> bool:
    """Return whether ranges are as those of Rows must be, and within [0, n)."""
    at = -1
    for first, stop in ranges:
        if not at < first < stop:
            return False
        at = stop
    return at <= n


def _without_open_queries(rows: Rows, live: LiveTokens, start: TurnStart) -> Rows:
    """Return these rows, but for those of queries that are open."""
    opened: list[Range] = []
    row = 0
    for block, (kind, _, size) in live.runs:
        if kind == _QUERY and start.closed_in[block.turn] >= start.turn:
            add_range(opened, row, row + size)
        row += size
    return Rows.where(rows.mask(row) & ~Rows(opened).mask(row)) if opened else rows


def placed(policy: MemoryPolicy, live: LiveTokens, start: TurnStart, before: np.ndarray) -> np.ndarray:
    """Return the region of each live token that stays, int8 [n]. before: their regions now. Raises ValueError."""
    region = _call(policy.regions, start, live, start)
    name = f"memory: {type(policy).__name__}.regions"
    if not isinstance(region, np.ndarray) or region.dtype != np.int8 or region.shape != (len(live),):
        given = f"{region.dtype} {list(region.shape)}" if isinstance(region, np.ndarray) else repr(region)
        raise ValueError(
            f"{name} returned {given} in turn {start.turn}; with memory.positions={CONTIGUOUS} it must be an array of int8, "
            f"one Region for each of the {len(live)} tokens that stay"
        )
    wrong = ((region < 0) | (region > before)).nonzero()[0]
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"{name} puts token {live.index[at]} into region {region[at]} in turn {start.turn}, it was in {before[at]} "
            f"({Region(int(before[at])).name}): a token stays where it is or moves to a region before"
        )
    return region


def live_bound(policy: MemoryPolicy, per_turn: int, fixed: int, video_per_turn: int, turns: int) -> int:
    """Return the policy's max_live_tokens. Raises ValueError: the policy's own, and for an answer that is no number."""
    sizes = {"per_turn": per_turn, "fixed": fixed, "video_per_turn": video_per_turn, "turns": turns}
    bound = _call(policy.max_live_tokens, None, allow_refusal=True, **sizes)
    if not isinstance(bound, int | np.integer) or bound < 1:
        raise ValueError(
            f"memory: {type(policy).__name__}.max_live_tokens returned {bound!r} for {sizes}; it must be a whole number of "
            "tokens, at least 1"
        )
    return int(bound)


def lane_one_start(policy: MemoryPolicy, lane0: int, lane1: int) -> int:
    """Return the policy's lane_one_begins. Raises ValueError for an answer that is no position."""
    first = _call(policy.lane_one_begins, None, lane0, lane1)
    if not isinstance(first, int | np.integer) or first < 0:
        raise ValueError(
            f"memory: {type(policy).__name__}.lane_one_begins returned {first!r} for ({lane0}, {lane1}); it must be a "
            "position, a whole number of at least 0"
        )
    return int(first)


def _call(
    method: Callable[..., Any], start: TurnStart | None, *args: Any, allow_refusal: bool = False, **named: Any
) -> Any:
    """Call a policy's method, which may be user code.

    Any exception is raised again as a ValueError that names the method, the turn if one starts, file and line. With
    `allow_refusal`, the method's own ValueError is an answer: it passes through unchanged.
    """
    try:
        return method(*args, **named)
    except Exception as error:  # named boundary: a user's code
        if allow_refusal and isinstance(error, ValueError):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        when = "" if start is None else f" in turn {start.turn}"
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

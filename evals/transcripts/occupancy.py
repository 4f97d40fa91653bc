"""What was in memory at each turn of a stream, computed from its log alone.

Pure. A token counts as live at a turn if the turn's last prefilled token q may attend to it (lanes aside):
`k <= q < expiry[k]`. At q, eviction has happened and generation has not begun.

Invariant: every evicted token is counted once, in the turn whose prefill comes next (at the latest in the last turn).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streams.log.record import GENERATED, Kind, StreamLog

# A copied thought follows the generation of its turn: no part of a prefill.
_AFTER_PREFILL = (*GENERATED, Kind.MEMORY)


@dataclass(frozen=True)
class TurnMemory:
    """The memory of one turn: tokens that it appended, live tokens by kind at its last prefilled token, tokens evicted."""

    turn: int
    tokens: int
    live: dict[Kind, int]
    evicted: int

    @property
    def live_tokens(self) -> int:
        return sum(self.live.values())

    @property
    def video_tokens(self) -> int:
        return self.live.get(Kind.VIDEO, 0)


Life = tuple[tuple[int, int], ...]
"""How many tokens of one turn are live at later turns: (turn, live tokens from then on), changes only, ascending."""


def turn_memory(log: StreamLog) -> tuple[TurnMemory, ...]:
    """Return one entry per turn of the log."""
    count = log.num_turns
    enters, leaves = _span(log)
    kinds = len(Kind)
    steps = np.zeros((count + 1, kinds), np.int64)
    seen = enters < leaves
    np.add.at(steps, (enters[seen], log.kind[seen]), 1)
    np.add.at(steps, (leaves[seen], log.kind[seen]), -1)
    live = np.cumsum(steps, axis=0)
    tokens = np.bincount(log.turn, minlength=count)
    gone = log.expiry[log.expiry < len(log)]
    # The first turn whose last prefilled token is at or behind the expiry. Behind the last turn nothing is prefilled.
    evicted = np.bincount(np.minimum(np.searchsorted(_last_prefilled(log), gone), count - 1), minlength=count)
    return tuple(
        TurnMemory(
            turn=turn,
            tokens=int(tokens[turn]),
            live={Kind(k): int(live[turn, k]) for k in range(kinds) if live[turn, k]},
            evicted=int(evicted[turn]),
        )
        for turn in range(count)
    )


def lives(log: StreamLog, kinds: tuple[Kind, ...]) -> tuple[Life, ...]:
    """Return, per turn of the log, the life of its tokens of these kinds; empty where it has none or none was seen."""
    count = log.num_turns
    enters, leaves = _span(log)
    chosen = np.isin(log.kind, kinds) & (enters < leaves)
    changes: list[dict[int, int]] = [{} for _ in range(count)]
    for origin, enter, leave in zip(log.turn[chosen], enters[chosen], leaves[chosen], strict=True):
        change = changes[origin]
        change[int(enter)] = change.get(int(enter), 0) + 1
        change[int(leave)] = change.get(int(leave), 0) - 1
    return tuple(_running(change, count) for change in changes)


def _span(log: StreamLog) -> tuple[np.ndarray, np.ndarray]:
    """Return the first turn at which each token is live, and the first at which it is not, int64 [L]; `num_turns` = never."""
    last = _last_prefilled(log)
    return np.searchsorted(last, np.arange(len(log))), np.searchsorted(last, log.expiry)


def _last_prefilled(log: StreamLog) -> np.ndarray:
    """Return, per turn, the index of its last prefilled token, int64 [turns]."""
    prefilled = ~np.isin(log.kind, _AFTER_PREFILL)
    last = np.full(log.num_turns, -1, np.int64)
    np.maximum.at(last, log.turn[prefilled], np.flatnonzero(prefilled))
    assert (last >= 0).all(), "every turn prefills its scaffold"
    return last


def _running(change: dict[int, int], count: int) -> Life:
    live, life = 0, []
    for turn in sorted(change):
        if change[turn] and turn < count:
            live += change[turn]
            life.append((turn, live))
    return tuple(life)

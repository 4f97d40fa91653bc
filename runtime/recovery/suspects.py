"""Work that may have ended the process that did it: it is given to a worker alone, and given up if it ends that, too. Pure.

Names are those of groups and streams, as `runtime.task_order.group_id` makes them: PASS/TASK. A name is under way on one worker
at a time; what is found out about it holds for its task in all passes (the number in PASS makes no difference).

Invariants:
* what was under way on a worker that died of something it may have done is suspect until it is over;
* a suspect has a worker to itself: nothing is sent beside it;
* only what was alone when MOST_ALONE processes died is condemned; a death that no work can have caused counts for nothing.
"""

from __future__ import annotations

import re
from collections import Counter

MOST_ALONE = 2
"""Processes that a piece of work may end while it is alone."""


class Suspects:
    """What is under way on which worker, and what of it may have ended one."""

    def __init__(self) -> None:
        self._under_way: dict[int, set[str]] = {}
        self._suspect: set[str] = set()  # keys, as of `_key`
        self._alone: Counter[str] = Counter()
        self._causes: dict[str, str] = {}
        self._last: dict[int, frozenset[str]] = {}  # what a worker's last process left behind, if it was not blamed

    def begin(self) -> None:
        """Note that nothing is under way; what was found out before holds."""
        self._under_way.clear()

    def may_take(self, worker: int, name: str) -> bool:
        """Return whether a piece of work may be sent to a worker now."""
        there = self._under_way.get(worker, set())
        return not there or (_key(name) not in self._suspect and not {_key(other) for other in there} & self._suspect)

    def sent(self, worker: int, name: str) -> None:
        """Note that a piece of work is under way."""
        self._under_way.setdefault(worker, set()).add(name)

    def over(self, worker: int, name: str) -> None:
        """Note that a worker has replied, well or not: it outlived this."""
        there = self._under_way.get(worker, set())
        if name in there:
            there.discard(name)
            self._suspect.discard(_key(name))

    def died(self, worker: int, cause: str | None) -> bool:
        """Note that a worker's process died; returns whether that condemns what it had.

        cause: of what, None if no work can have caused it.
        """
        left = frozenset(self._under_way.pop(worker, ()))
        if cause is None:
            self._last[worker] = left
            return False
        self._last.pop(worker, None)
        return self._blame(left, cause)

    def blame_last(self, worker: int, cause: str) -> None:
        """Note that the last death of a worker had a cause after all."""
        self._blame(self._last.pop(worker, frozenset()), cause)

    def condemned(self, name: str) -> str | None:
        """Return why a piece of work must not be sent again, in words; None if it may."""
        key = _key(name)
        if self._alone[key] < MOST_ALONE:
            return None
        return f"it ended the workers that had it alone, {self._alone[key]} times: {self._causes[key]}"

    def _blame(self, left: frozenset[str], cause: str) -> bool:
        self._suspect |= {_key(name) for name in left}
        if len(left) != 1:
            return False
        (name,) = left
        self._alone[_key(name)] += 1
        self._causes.setdefault(_key(name), cause)
        if self.condemned(name) is None:
            return False
        self._suspect.discard(_key(name))  # it is not sent any more
        return True


def _key(name: str) -> str:
    """Return a name without the number of its pass."""
    before, slash, task = name.partition("/")
    return re.sub(r"\d+", "", before) + slash + task

"""A cache under a byte budget: clips of a worker, references to features in the driver.

Invariants:
* what is kept never takes more than the budget; the least recently used value goes first;
* not thread-safe: one thread owns a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteBudgetCache(Generic[T]):
    """Least-recently-used cache; a value larger than the whole budget is not kept."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self.used = 0
        self._values: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, key: str) -> T | None:
        """Return the value of `key` and mark it as used; None if it is not kept."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: str, value: T, nbytes: int) -> None:
        """Keep `value`, which counts `nbytes`, and drop others until it fits."""
        self.forget(key)
        if nbytes > self.budget:
            return
        while self.used + nbytes > self.budget:
            _, (_, freed) = self._values.popitem(last=False)
            self.used -= freed
        self._values[key] = (value, nbytes)
        self.used += nbytes

    def forget(self, key: str) -> None:
        """Drop the value of `key`, if it is kept."""
        if key in self._values:
            self.used -= self._values.pop(key)[1]

    def clear(self) -> None:
        self._values.clear()
        self.used = 0

    def __len__(self) -> int:
        return len(self._values)

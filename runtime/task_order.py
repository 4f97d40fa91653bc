"""Which task comes next: seeded epochs over the dataset, with identities, and which groups are behind a stage.

Invariants:
* the order depends only on seed, epoch and number of rows;
* a group has the id `epoch/task`, a stream `epoch/task/stream`, and a stream's random seed derives from its id;
* a resumed stage walks the same order, without the groups that its checkpoint names as done;
* groups that are done are kept by their places in the order, so that they take as much room as the order has gaps; they are
  the same groups when rows have come or gone since, which changes all places.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from itertools import count

import numpy as np

from runtime.store.checkpoint import CheckpointState, Groups
from runtime.store.ranges import Ranges
from streams.task import StreamTask


class TaskOrder:
    """The order of the groups of a stage. rows: ids of its tasks, as they are in the file."""

    def __init__(self, rows: Sequence[str], seed: int) -> None:
        self.rows, self.seed = tuple(rows), seed
        self._index = {row: i for i, row in enumerate(self.rows)}

    def at(self, place: int) -> tuple[int, int]:
        """Return the epoch of a place, and the row that comes there."""
        epoch, within = divmod(place, len(self.rows))
        return epoch, int(_permutation(len(self.rows), self.seed, epoch)[0][within])

    def group(self, place: int) -> str:
        epoch, row = self.at(place)
        return _name(epoch, self.rows[row])

    def place(self, group: str) -> int | None:
        """Return the place of a group; None if it is of a row that is not here."""
        epoch, _, task = group.partition("/")
        row = self._index.get(task)
        if row is None or not epoch.isdecimal():
            return None
        return int(epoch) * len(self.rows) + int(_permutation(len(self.rows), self.seed, int(epoch))[1][row])


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of an epoch in their order, and of each row where it comes. Groups of few epochs are under way."""
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order, np.argsort(order)


class GroupSet:
    """Ids of groups, each at most once. It iterates by their order, then over those of rows that are not here."""

    def __init__(self, order: TaskOrder) -> None:
        self._order = order
        self._places = Ranges()
        self._others: dict[str, None] = {}

    @classmethod
    def restore(cls, order: TaskOrder, state: CheckpointState | None, which: str) -> GroupSet:
        """Return the groups of a checkpoint. which: `consumed` or `dropped`."""
        made = cls(order)
        if state is None:
            return made
        stored: Groups = getattr(state, which)
        if (state.rows, state.seed) == (order.rows, order.seed):
            made._places = Ranges(stored.ranges)
            made._others = dict.fromkeys(stored.names)
        else:
            for group in names_of(state, which):
                made.add(group)
        return made

    def stored(self) -> Groups:
        """Return the set as checkpoints keep it."""
        return Groups(self._places.pairs, tuple(self._others))

    def add(self, group: str) -> None:
        """Add a group that is not there yet."""
        place = self._order.place(group)
        if place is None:
            assert group not in self._others, f"group {group} is there already"
            self._others[group] = None
        else:
            self._places.add(place)

    def __contains__(self, group: object) -> bool:
        if not isinstance(group, str):
            return False
        place = self._order.place(group)
        return group in self._others if place is None else place in self._places

    def __iter__(self) -> Iterator[str]:
        yield from map(self._order.group, self._places)
        yield from self._others

    def __len__(self) -> int:
        return len(self._places) + len(self._others)


class Either:
    """The groups of two sets that have none in common."""

    def __init__(self, one: GroupSet, other: GroupSet) -> None:
        self._one, self._other = one, other

    def __contains__(self, group: object) -> bool:
        return group in self._one or group in self._other

    def __len__(self) -> int:
        return len(self._one) + len(self._other)


def names_of(state: CheckpointState, which: str = "consumed") -> list[str]:
    """Return the ids of a checkpoint's `consumed` or `dropped` groups."""
    stored: Groups = getattr(state, which)
    order = TaskOrder(state.rows, state.seed)
    return [*map(order.group, Ranges(stored.ranges)), *stored.names]


def epochs(tasks: Sequence[StreamTask], seed: int, done: Container[str] = ()) -> Iterator[tuple[int, StreamTask]]:
    """Yield (epoch, task) for ever, each epoch in a new random order, without the groups in `done`.

    Raises ValueError if there is no task.
    """
    if not tasks:
        raise ValueError("there is no usable training task (see the skipped lines above, and data.train)")
    order = TaskOrder([task.id for task in tasks], seed)
    for place in count():
        epoch, row = order.at(place)
        if group_id(epoch, tasks[row]) not in done:
            yield epoch, tasks[row]


def group_id(epoch: int, task: StreamTask) -> str:
    return _name(epoch, task.id)


def _name(epoch: int, task: str) -> str:
    return f"{epoch}/{task}"

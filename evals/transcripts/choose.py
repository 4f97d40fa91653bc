"""Chooses the held-out streams that get a transcript: few, of every category, failures and successes alike.

Pure and deterministic. Categories take turns, in alphabetical order; within a category the picks are,
again and again, the lowest reward that is left, the largest change against the checkpoint before (where there is one and
anything changed), and the highest reward; ties go by task id. Streams that could not be run come last: they show nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from evals.categories import category_name
from evals.heldout import ScoredStream


def choose(streams: Sequence[ScoredStream], before: Mapping[str, float], count: int) -> tuple[str, ...]:
    """Return the ids of at most `count` tasks, in the order of choice. before: an earlier checkpoint's rewards by task id."""
    by_category: dict[str, list[ScoredStream]] = {}
    for stream in streams:
        by_category.setdefault(category_name(stream.task.category), []).append(stream)
    orders = [_order(by_category[name], before) for name in sorted(by_category)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*orders))
    return tuple(itertools.islice((task for task in turns if task is not None), count))


def _order(streams: list[ScoredStream], before: Mapping[str, float]) -> Iterator[str]:
    """Yield all task ids of one category, in the order in which they are picked."""
    left = sorted((s for s in streams if s.failed is None), key=lambda s: (s.result.total, s.task.id))

    def changed(stream: ScoredStream) -> float:
        return abs(stream.result.total - before.get(stream.task.id, stream.result.total))

    while left:
        yield left.pop(0).task.id
        # `max` returns the first of equal changes, which has the lower reward.
        most = max(range(len(left)), key=lambda i: changed(left[i]), default=None)
        if most is not None and changed(left[most]) > 0:
            yield left.pop(most).task.id
        if left:
            yield left.pop().task.id
    yield from sorted(s.task.id for s in streams if s.failed is not None)

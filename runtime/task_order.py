"""Which task comes next: seeded epochs over the dataset, with identities.

Invariants:
* the order depends only on seed and epoch;
* a group has the id `epoch/task`, a stream `epoch/task/stream`, and a stream's random seed derives from its id;
* a resumed stage walks the same order, without the groups that its checkpoint names as done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from streams.task import StreamTask


def epochs(tasks: tuple[StreamTask, ...], seed: int, done: Collection[str] = ()) -> Iterator[tuple[int, StreamTask]]:
    """Yield (epoch, task) for ever, each epoch in a new random order, without the groups named in `done`.

    Raises ValueError if there is no task.
    """
    if not tasks:
        raise ValueError("there is no usable training task (see the skipped lines above, and data.train)")
    left = set(done)
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(tasks))
        for i in order:
            task = tasks[int(i)]
            name = group_id(epoch, task)
            if name in left:
                left.remove(name)
            else:
                yield epoch, task
        epoch += 1


def group_id(epoch: int, task: StreamTask) -> str:
    return f"{epoch}/{task.id}"

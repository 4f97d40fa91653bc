"""Which task comes next: seeded epochs over the dataset, with identities.

Invariant: the order depends only on seed and epoch; every group has the id `epoch/task`, every stream
`epoch/task/stream`, and its random seed derives from that id. A resumed stage walks the same order and leaves out what
its checkpoint names as done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from streams.task import StreamTask


def epochs(tasks: tuple[StreamTask, ...], seed: int, done: Collection[str] = ()) -> Iterator[tuple[int, StreamTask]]:
    """(epoch, task) for ever, each epoch a fresh permutation, without the groups named in `done`."""
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

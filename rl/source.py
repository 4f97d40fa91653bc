"""Which task comes next: seeded epochs over the dataset, with identities.

Owner: rl. Invariant: the order depends only on seed and epoch; every group has the id `epoch/task`, every stream
`epoch/task/stream`, and its random seed derives from that id.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streams.task import StreamTask


def epochs(tasks: tuple[StreamTask, ...], seed: int) -> Iterator[tuple[int, StreamTask]]:
    """(epoch, task) for ever, each epoch a fresh permutation."""
    if not tasks:
        raise ValueError("there is no usable training task (see the skipped lines above, and data.train)")
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(tasks))
        for i in order:
            yield epoch, tasks[int(i)]
        epoch += 1


def group_id(epoch: int, task: StreamTask) -> str:
    return f"{epoch}/{task.id}"

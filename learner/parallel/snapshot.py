"""DeepSpeed's checkpoints without waiting for the disk: what it saves is copied, and written later.

It is DeepSpeed's own place for this: a checkpoint engine. (Those that it comes with write in another process, with kernels
that have to be compiled, and hold up the next optimiser step until everything is written.)

Invariants:
- Files have DeepSpeed's own names and layout, and DeepSpeed loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from learner.saving import HostCopies


class SnapshotEngine(TorchCheckpointEngine):
    """Takes a copy of every file that DeepSpeed saves; loads as DeepSpeed does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._copies: HostCopies | None = None
        self._files: list[tuple[Any, str]] = []

    @contextmanager
    def collecting(self) -> Iterator[HostCopies]:
        """Copy what is saved within the block. `take` it there: nothing is kept after it."""
        self._copies = HostCopies()
        try:
            yield self._copies
        finally:
            self._copies, self._files = None, []

    def save(self, state_dict: Any, path: str) -> None:
        assert self._copies is not None, "a checkpoint is saved within `collecting`"
        self._files.append((self._copies.within(state_dict), path))

    def take(self) -> Callable[[], None]:
        """Return a function that writes the files saved since the last call."""
        files, self._files = self._files, []
        write = super().save

        def write_all() -> None:
            for state, path in files:
                write(state, path)

        return write_all

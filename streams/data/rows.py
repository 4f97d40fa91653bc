"""The tasks of a file, kept on disk: a row takes a few bytes of memory, however much text is in it.

Tasks that fit into MEMORY_BYTES never leave memory. The others go to a temporary file without a name (in `TMPDIR`), which ends
with the process. Nobody else can write there, so what is read back is trusted.

Invariants:
* a task that is read is equal to the one that was added, `origin` and `file` included;
* rows are only added before they are read.
"""

from __future__ import annotations

import pickle
import tempfile
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import numpy as np

from streams.task import StreamTask

MEMORY_BYTES = 32 * 2**20
VIDEOS_KNOWN = 2**16
"""Videos of which something is remembered, so that they are not looked at again for another row."""


@contextmanager
def _told() -> Iterator[None]:
    """Say of an OSError what is being written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"rows are kept in a temporary file, which cannot be written ({error.strerror or error}): make room in its "
            "folder, or name another one with the environment variable TMPDIR",
        ) from error


class _Store:
    """Tasks one after the other. offsets: where each begins, and where the next one would."""

    def __init__(self) -> None:
        # Not closed by anyone: whoever holds a row of it needs it.
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115
        self._lock = threading.Lock()
        self.offsets = array("Q", [0])

    def add(self, task: StreamTask) -> None:
        """Raises OSError for a full disk, or without a folder to write to."""
        packed = pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)
        with _told():
            self._file.write(packed)
        self.offsets.append(self.offsets[-1] + len(packed))

    def flush(self) -> None:
        """Write what is not in the file yet, so that reading fails for no lack of room. Raises OSError."""
        with _told():
            self._file.flush()

    def read(self, number: int) -> StreamTask:
        begin, end = self.offsets[number], self.offsets[number + 1]
        with self._lock:
            self._file.seek(begin)
            packed = self._file.read(end - begin)
        task: StreamTask = pickle.loads(packed)
        return task


class TaskRows(Sequence[StreamTask]):
    """A sequence of tasks; each is made anew when it is asked for. Equal to any sequence of equal tasks."""

    def __init__(self, store: _Store, numbers: np.ndarray) -> None:
        """numbers: int64 [n], which rows of the store these are."""
        self._store, self._numbers = store, numbers

    @classmethod
    def of(cls, tasks: Iterable[StreamTask]) -> TaskRows:
        """Return the tasks as rows. Raises OSError for a full disk."""
        store = _Store()
        for task in tasks:
            store.add(task)
        store.flush()
        return cls(store, np.arange(len(store.offsets) - 1))

    @overload
    def __getitem__(self, index: int) -> StreamTask: ...

    @overload
    def __getitem__(self, index: slice) -> TaskRows: ...

    def __getitem__(self, index: int | slice) -> StreamTask | TaskRows:
        if isinstance(index, slice):
            return TaskRows(self._store, self._numbers[index])
        return self._store.read(int(self._numbers[index]))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[StreamTask]:
        return map(self._store.read, self._numbers.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} tasks>"

    def select(self, indices: Sequence[int] | np.ndarray) -> TaskRows:
        """Return some of the rows, in the order of `indices`."""
        return TaskRows(self._store, self._numbers[np.asarray(indices, np.int64)])

"""Checkpoints beside training: what is to be saved is copied to host memory, and a thread writes the copy.

Invariants:
- A copy shares no memory with anything that trains.
- What is saved under several names, or in several files, is copied once.
- One checkpoint is written at a time, so there is one copy at most.
"""

from __future__ import annotations

import copy
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch


class HostCopies:
    """Copies in host memory of the tensors of one moment: nothing may change between the first and the last."""

    def __init__(self) -> None:
        # The original is kept as well: memory of a tensor that is gone may be another's by the next call.
        self._made: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor; of tensors that are the same part of the same memory, the same one."""
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._made:
            self._made[place] = (tensor, tensor.detach().to("cpu", copy=True))
        return self._made[place][1]

    def within(self, state: Any) -> Any:
        """Return a deep copy of nested dicts, lists and tuples with their tensors in host memory."""
        # By identity, as `deepcopy` looks for what it has copied before.
        memo = {id(tensor): self.of(tensor) for tensor in _tensors(state)}
        return copy.deepcopy(state, memo)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


class BackgroundWriter:
    """Calls one function at a time, in a thread that does not keep the process from ending."""

    def __init__(self) -> None:
        self._last: Future[None] | None = None

    def problem(self) -> RuntimeError | None:
        """Return why nothing can be started now, if so."""
        if self._last is None or self._last.done():
            return None
        return RuntimeError("an earlier checkpoint, which was given up, is still being written")

    def start(self, write: Callable[[], None]) -> Future[None]:
        """Have `write` called; the future is done when it has returned, and has its error."""
        assert self.problem() is None, "one checkpoint is written at a time"
        future: Future[None] = Future()
        self._last = future

        def run(given: list[Callable[[], None]]) -> None:
            try:
                # Nothing holds the copy any more once it is written.
                given.pop()()
            except Exception as error:  # noqa: BLE001 - whoever waits for the future gets it
                traceback.clear_frames(error.__traceback__)
                future.set_exception(error)
            else:
                future.set_result(None)

        threading.Thread(target=run, args=([write],), name="checkpoint", daemon=True).start()
        return future

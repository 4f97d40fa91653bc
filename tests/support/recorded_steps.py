"""Stands in for CUDA graphs on a CPU: what a step calls of torch is recorded once, and replayed on the same buffers.

As in a graph, Python runs only while it is recorded: a number that the host read then stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from streams.backbone.kernel_choice import Choice
from tests.support.gather_attention import GatherBackend, WholeTableBackend

Call = tuple[Any, Any, Any, Any]
"""Operator, arguments, keyword arguments, what it returned."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


class RecordedCapture:
    """In the place of `rollout.decode.graphs.CudaCapture`."""

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        with _Recording() as recording:
            step()
        return lambda: _replay(recording.calls)


def replay_on_pages(monkeypatch: pytest.MonkeyPatch, backend: type[GatherBackend] = WholeTableBackend) -> None:
    """Let every engine keep pages and replay its decode steps, as on CUDA with FlashInfer and Triton."""
    choice = "rollout.engine.engine.choose_"
    monkeypatch.setattr(f"{choice}rollout_attention", lambda *_: Choice("flashinfer", "for the test"))
    monkeypatch.setattr(
        f"{choice}cuda_graphs", lambda asked, *_: Choice("eager" if asked == "off" else "graphs", asked)
    )
    monkeypatch.setattr("rollout.engine.engine.make_backend", lambda name, pool, groups: backend(pool, groups))
    monkeypatch.setattr("rollout.decode.graphs.CudaCapture", RecordedCapture)


def _replay(calls: list[Call]) -> None:
    # Recorded tensors are alive, so their ids are theirs. What is not among them was there before: a static buffer.
    now: dict[int, Any] = {}

    def current(leaf: Any) -> Any:
        return now.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf

    for func, args, kwargs, made in calls:
        again = func(*tree_map(current, args), **tree_map(current, kwargs))
        for before, after in zip(tree_leaves(made), tree_leaves(again), strict=True):
            if isinstance(before, torch.Tensor):
                now[id(before)] = after

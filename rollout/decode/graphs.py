"""CUDA graphs of the decode step: captured once per size of batch, replayed by every visit.

A graph holds what a step launches, with the addresses it was launched on. A batch takes the smallest size that it fits into;
what is left of it is the seat of nobody.

Invariants:
* capturing changes no stream: it runs on the seat of nobody;
* graphs outlive a swap of weights, which copies into the parameters. Where a buffer or a parameter lies elsewhere than when
  they were captured, none of them is replayed again;
* a step that cannot be captured is run kernel by kernel, and a warning says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from rollout.decode.state import DecodeState, Kinds
from rollout.engine.kv_pool import KVPool
from streams.backbone.backbone import Backbone

log = logging.getLogger(__name__)

Step = Callable[[torch.Tensor, Kinds], None]
"""A decode step of the seats int64 [n] in a buffer."""


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the sizes that graphs are captured for, up to `most` rows: powers of two, and from 8 on one between each two."""
    powers = [1 << i for i in range(most.bit_length())]
    between = [power + power // 2 for power in powers if power >= 8]
    return (*sorted(size for size in powers + between if size < most), most)


class CudaCapture:
    """Captures steps into graphs that share their memory: they run one after the other, and keep no result in it."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what replays a step. Raises RuntimeError if it does what a graph cannot hold."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # Kernels are compiled and libraries opened at their first use, which cannot be captured.
            step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls count: another one may stage weights meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                step()
        finally:
            # A capture that fails leaves its stream the current one.
            torch.cuda.set_stream(current)
        return graph.replay


class StepGraphs:
    """The graphs of one decoder.

    Attributes:
        captured: graphs that were captured so far.
        failure: why a step could not be captured; empty: nothing failed.
    """

    def __init__(self, step: Step, state: DecodeState, pool: KVPool, backbone: Backbone) -> None:
        self.captured = 0
        self.failure = ""
        self._step, self._state, self._pool, self._backbone = step, state, pool, backbone
        self._sizes = batch_sizes(state.nobody)
        self._seats = torch.full((state.nobody,), state.nobody, device=state.ints.device)
        self._graphs: dict[tuple[int, Kinds], Callable[[], None]]
        self._capture: CudaCapture
        self._buffers: tuple[tuple[int, torch.Size], ...]
        self._addresses: dict[str, int]
        self._version: int | None
        self._forget()

    def prepare(self) -> str:
        """Capture the largest batch, which needs the most memory; returns why that failed, or nothing."""
        self._graph(self._sizes[-1], Kinds())
        return self.failure

    def replay(self, seats: list[int], kinds: Kinds, steps: int, version: int) -> bool:
        """Run steps of the seats; returns False, and does nothing, if a step cannot be captured.

        version: of the weights. Whether they still lie where they did is looked up when it changes.
        """
        if self.failure:
            return False
        if self._moved(version):
            self._forget()
        size = next(size for size in self._sizes if size >= len(seats))
        graph = self._graph(size, kinds)
        if graph is None:
            return False
        self._seats[:size] = torch.tensor(seats + [self._state.nobody] * (size - len(seats)))
        for _ in range(steps):
            graph()
        return True

    def _graph(self, size: int, kinds: Kinds) -> Callable[[], None] | None:
        if (size, kinds) not in self._graphs:
            seats = self._seats[:size].fill_(self._state.nobody)
            self._addresses = self._addresses or addresses(self._backbone.model)
            try:
                self._graphs[size, kinds] = self._capture(lambda: self._step(seats, kinds))
            # Named boundary: what a device or a driver refuses. The step itself still runs.
            except RuntimeError as error:
                self.failure = f"a decode step of {size} rows cannot be captured: {type(error).__name__}: {error}"
                log.warning("rollout.cuda_graphs: %s; it runs kernel by kernel from now on", self.failure)
                self._forget()
                return None
            self.captured += 1
        return self._graphs[size, kinds]

    def _moved(self, version: int) -> bool:
        """Whether anything that the graphs read or write lies elsewhere now."""
        if self._buffers != self._now():
            return True
        if version == self._version:
            return False
        self._version = version
        moved = bool(self._addresses) and self._addresses != addresses(self._backbone.model)
        if moved:
            log.warning(
                "rollout.cuda_graphs: weights were replaced and not copied into; decode steps are captured anew"
            )
        return moved

    def _forget(self) -> None:
        """Drop all graphs, and the memory that they share."""
        self._graphs = {}
        self._capture = CudaCapture()
        self._buffers = self._now()
        self._addresses = {}
        self._version = None

    def _now(self) -> tuple[tuple[int, torch.Size], ...]:
        # Un-rotated keys are not among them: they are made once, before the first step that needs them is captured. A buffer
        # that grew twice may lie where it did at first.
        return tuple((buffer.data_ptr(), buffer.shape) for buffer in (*self._state.buffers, self._pool.kv))


def addresses(model: torch.nn.Module) -> dict[str, int]:
    """Return where the parameters and buffers of a model lie, by name."""
    return {name: t.data_ptr() for part in (model.named_parameters(), model.named_buffers()) for name, t in part}

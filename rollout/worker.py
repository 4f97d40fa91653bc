"""The rollout worker's Ray actor: a thin asynchronous shell around `RolloutService`.

Invariants:
* every call returns when its own work is done and blocks no other: groups, demonstrations, weights and counters overlap;
* weights are fetched in a thread of their own: no stream waits for a transfer;
* the driver imports this module, too: torch and the engine are imported by the constructor, in the worker's process.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rollout.promises import ServiceClosedError
from rollout.setup import WorkerInfo, WorkerSetup
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig
from streams.messages import (
    MESSAGES_VERSION,
    GroupPayload,
    GroupSummary,
    RolloutTask,
    RowTexts,
    RowWords,
    ScriptTask,
    SwapReport,
    WeightsUpdate,
    WorkerStats,
)
from streams.support.actor_log import open_actor_log
from streams.support.imports import large_imports
from streams.support.usage import DeviceInfo, ProcessUsage

if TYPE_CHECKING:
    from rollout.service import RolloutService

log = logging.getLogger("sightline.rollout")


class RolloutWorker:
    """Actor class; made a Ray actor by `runtime.cluster.session` with the placement's resources."""

    def __init__(self, worker: int, threads: int, cache_mb: int) -> None:
        open_actor_log()
        with large_imports():
            import torch

            import rollout.service  # noqa: F401

        torch.set_num_threads(threads)
        self._worker = worker
        self._cache_mb = cache_mb
        self._service: RolloutService | None = None
        self._loading = asyncio.Lock()

    async def device(self) -> DeviceInfo:
        """Return the device that this worker would load onto, before it does."""
        from streams.support.meter import device_info

        return await asyncio.to_thread(device_info, ray.util.get_node_ip_address())

    async def usage(self) -> ProcessUsage | None:
        """Return where its time and memory went; None if it has loaded nothing, as it took another one's place."""
        if self._service is None:
            return None
        from streams.scoring.compiled import compile_count

        return ProcessUsage(f"rollout worker {self._worker}", self._ready().meter.usage(), compile_count())

    async def build_tiny(self, folder: str, spec: TinySpec, seed: int, dtype: str) -> str:
        """Write the random checkpoint to `folder`. Here, because the driver loads no torch."""
        import torch

        from streams.backbone.tiny import build_tiny

        return str(await asyncio.to_thread(build_tiny, Path(folder), spec, seed=seed, dtype=getattr(torch, dtype)))

    async def read_rows(
        self, checkpoint: str, layout: LayoutConfig, rows: tuple[RowTexts, ...]
    ) -> tuple[RowWords, ...]:
        """Judge the rows' texts by the checkpoint's tokenizer. Here, because the driver loads no tokenizer."""
        from streams.backbone.vocabulary import text_layout
        from streams.data.answerable import read_words

        def read() -> tuple[RowWords, ...]:
            words = text_layout(checkpoint, layout)
            return tuple(read_words(row, words) for row in rows)

        return await asyncio.to_thread(read)

    async def setup(self, setup: WorkerSetup) -> WorkerInfo:
        """(Re)load a checkpoint for a stage; running groups of an earlier stage are forgotten."""
        if setup.messages_version != MESSAGES_VERSION:
            raise ValueError(f"worker speaks messages version {MESSAGES_VERSION}, driver {setup.messages_version}")
        # One after the other: a worker may be asked for the next stage while it loads in place of one that died.
        async with self._loading:
            await self._close_service()
            await asyncio.to_thread(self._open_service, setup)
        service = self._ready()
        log.info("loaded %s as version %d, %d KV slots", setup.checkpoint, setup.version, service.engine.pool.capacity)
        return WorkerInfo(
            worker=self._worker,
            node=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            kv_slots=service.engine.pool.capacity,
            parameters=sum(p.numel() for p in service.backbone.model.parameters()),
            attention=str(service.engine.attention),
        )

    async def rollout(self, task: RolloutTask) -> tuple[GroupSummary, GroupPayload | None]:
        with _closed_means_cancelled():
            return await asyncio.wrap_future(self._ready().submit(task))

    async def script(self, task: ScriptTask) -> tuple[GroupSummary, GroupPayload | None]:
        with _closed_means_cancelled():
            return await asyncio.wrap_future(self._ready().script(task))

    async def update_weights(self, update: list[Any]) -> SwapReport:
        """`update` holds one object reference (in a list, so that Ray does not fetch it before the call)."""
        service = self._ready()
        began = time.monotonic()
        fetched: WeightsUpdate = await asyncio.wait_for(update[0], timeout=service.setup.rollout.group_deadline_s)
        with _closed_means_cancelled():
            future = await asyncio.to_thread(service.stage, fetched, time.monotonic() - began)
            return await asyncio.wrap_future(future)

    async def stats(self) -> WorkerStats | None:
        """Return its counters, also as a sign of life; None if it has loaded nothing."""
        return None if self._service is None else self._service.stats()

    async def pid(self) -> int:
        return os.getpid()

    async def _close_service(self) -> None:
        """Give back the last stage's model and KV pool before the next one's are made: a GPU need not hold both."""
        if self._service is None:
            return
        await asyncio.to_thread(self._end_service)
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open_service(self, setup: WorkerSetup) -> None:
        """Open a service and keep it here: the thread that runs this may keep what it returns a little longer."""
        from rollout.service import RolloutService

        get = partial(_get, timeout_s=setup.rollout.group_deadline_s)
        self._service = RolloutService(self._worker, setup, self._cache_mb, _put, get)

    def _end_service(self) -> None:
        """Close the service and let go of it here: the thread that runs this may keep what it was given a little longer."""
        service = self._ready()
        service.close()
        self._service = None

    def _ready(self) -> RolloutService:
        if self._service is None:
            raise RuntimeError("the rollout worker was used before setup()")
        return self._service


@contextmanager
def _closed_means_cancelled() -> Iterator[None]:
    """Cancel what a stage leaves behind instead of failing it.

    Nobody waits for it any more, and Ray would print the failure with its traceback in the middle of the next stage.
    """
    try:
        yield
    except ServiceClosedError as error:
        raise asyncio.CancelledError(str(error)) from None


def _put(array: np.ndarray) -> Any:
    return ray.put(array)


def _get(reference: Any, *, timeout_s: float) -> np.ndarray:
    return ray.get(reference, timeout=timeout_s)

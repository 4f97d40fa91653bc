"""Rollout services in this process, without Ray: a tiny checkpoint, real clips, real threads.

`put` and `get` are the identity here: what an actor ships by reference comes back as the array itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout.service import RolloutService, ServiceLimits
from rollout.setup import WorkerSetup
from streams.backbone.boundary import Boundary
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import RolloutTask
from streams.video.config import VideoConfig

LAYOUT = LayoutConfig(system_prompt="Watch.", think_budget=5, max_new_tokens=9)


def worker_setup(checkpoint: Path, **given: Any) -> WorkerSetup:
    """A small worker; what is `given` differs."""
    values: dict[str, Any] = {
        "dtype": "float32",
        "layout": LAYOUT,
        "memory": MemoryConfig("rcsm", 2),
        "video": VideoConfig(),
        "boundary": Boundary.TOWER_MERGER,
        "max_streams": 16,
        "kv_slots": 4096,
        "monitor_every": 1,
        "run_seed": 0,
    }
    return WorkerSetup(checkpoint=str(checkpoint), **values | given)


def open_service(setup: WorkerSetup, worker: int = 0, **limits: float) -> RolloutService:
    """To be closed by whoever opened it."""
    return RolloutService(worker, setup, ServiceLimits(**limits), put=lambda array: array, get=lambda array: array)


WAIT_S = 60.0
TURNS = 6


def group(task, name, streams=3, turns=TURNS, temperature=1.0, **more):
    return RolloutTask(name, 0, task, streams, turns, temperature, **more)


def roll(service, request):
    return service.submit(request).result(timeout=WAIT_S)

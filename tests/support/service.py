"""Rollout services in this process, without Ray: a tiny checkpoint, real clips, real threads.

`put` and `get` are the identity here: what an actor ships by reference comes back as the array itself.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout.config import RolloutConfig
from rollout.service import RolloutService
from rollout.setup import SelfCheckSetup, WorkerSetup
from streams.backbone.boundary import Boundary
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import RolloutTask, WeightsUpdate
from streams.task import Plan
from streams.video.config import VideoConfig

LAYOUT = LayoutConfig(system_prompt="Watch.", think_budget=5, max_new_tokens=9)


def worker_setup(checkpoint: Path, *, max_streams: int = 16, monitor_every: int = 1, **given: Any) -> WorkerSetup:
    """Return the setup of a small worker, with the values in `given` in place of its own."""
    values: dict[str, Any] = {
        "dtype": "float32",
        "layout": LAYOUT,
        "memory": MemoryConfig("rcsm", 2),
        "video": VideoConfig(),
        "rollout": RolloutConfig(max_streams=max_streams),
        "boundary": Boundary.TOWER_MERGER,
        "kv_slots": 4096,
        "run_seed": 0,
        "self_check": SelfCheckSetup(monitor_every),
    }
    return WorkerSetup(checkpoint=str(checkpoint), **values | given)


def open_service(setup: WorkerSetup, worker: int = 0, cache_mb: int = 256) -> RolloutService:
    """Open a service. The caller closes it."""
    return RolloutService(worker, setup, cache_mb, put=lambda array: array, get=lambda array: array)


WAIT_S = 60.0
TURNS = 6


def group(task, name, streams=3, turns=TURNS, temperature=1.0, **more):
    return RolloutTask(name, task, Plan(turns, 1.0), streams, temperature, **more)


def roll(service, request):
    return service.submit(request).result(timeout=WAIT_S)


def wait_until(condition, what):
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.002)


def update_of(backbone, version, change=0.0, freeze="tower+merger"):
    """The backbone's trainable tensors plus noise of std `change`, as the learner publishes them."""
    generator = torch.Generator().manual_seed(version)
    tensors = {
        name: (p.detach().clone() + change * torch.randn(p.shape, generator=generator)).contiguous()
        for name, p in backbone.model.named_parameters()
        if freeze == "none" or ".visual." not in name
    }
    return WeightsUpdate(
        version=version,
        names=tuple(tensors),
        shapes=tuple(tuple(t.shape) for t in tensors.values()),
        dtype="float32",
        buffer=np.concatenate([t.view(-1).view(torch.uint8).numpy() for t in tensors.values()]),
    )

"""The rollout worker's shell in this process: the class behind the Ray actor, with the real service and a tiny model."""

from __future__ import annotations

import asyncio
import weakref

import pytest

import rollout.service
from rollout.worker import RolloutWorker
from tests.support.service import group

# A worker sets the threads of its process.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("learner_process")]


def test_a_stages_model_and_kv_pool_are_gone_before_the_next_ones_are_made(setup, tasks, monkeypatch):
    """Together they need not fit on a GPU."""
    made: list[weakref.ref] = []
    alive: list[int] = []

    class Counting(rollout.service.RolloutService):
        def __init__(self, *args):
            alive.append(sum(ref() is not None for ref in made))
            super().__init__(*args)
            made.extend(weakref.ref(thing) for thing in (self, self.backbone.model, self.engine.pool))

    monkeypatch.setattr(rollout.service, "RolloutService", Counting)
    worker = RolloutWorker(worker=0, threads=1, cache_mb=64)
    monkeypatch.setattr("rollout.worker._put", lambda array: array)

    async def stages():
        await worker.setup(setup)
        summary, _ = await worker.rollout(group(tasks[0], "0/a"))
        assert summary.failed is None, summary.failed
        del summary, _
        await worker.setup(setup)
        await worker.setup(setup)

    asyncio.run(stages())
    worker._ready().close()
    assert alive == [0, 0, 0]

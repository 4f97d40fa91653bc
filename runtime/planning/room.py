"""Whether disk, caches and object stores have room for a training stage: for a run that starts, and for one that only asks.

Nothing is loaded before these have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from conf.schema import RunConfig
from learner.config import LearnerConfig
from runtime.planning.clip_cache import check_features
from runtime.planning.disk import check_disk, checkpoint_size
from runtime.planning.object_store import NodeStore, check_object_store, store_need
from runtime.planning.stream_size import StreamSize
from streams.checkpoint.model_shape import ModelGeometry
from streams.task import StreamTask


def room_checks(
    config: RunConfig,
    root: Path,
    geometry: ModelGeometry,
    learner: LearnerConfig,
    stage: str,
    tasks: Sequence[StreamTask],
    stores: Sequence[NodeStore],
) -> dict[str, Callable[[], list[str]]]:
    """Return the checks by what they look at. Each returns lines with the arithmetic, or raises ValueError."""

    def disk() -> list[str]:
        size = checkpoint_size(geometry, learner)
        return [check_disk(root, size, config.checkpoint, best=bool(config.eval.every), stage=stage)]

    def clips() -> list[str]:
        turns = max((config.data.plan_of(task).turns for task in tasks), default=1)
        return [check_features(config, geometry, stage, turns)]

    def object_store() -> list[str]:
        stream = StreamSize.largest(config, tasks, geometry)
        return check_object_store(store_need(config, geometry, learner, stage, stream), stores)

    return {"disk": disk, "clips": clips, "object store": object_store}

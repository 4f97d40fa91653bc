"""The learner's Ray actor: a thin shell that resolves object references and calls the engine.

Owner: learner. One actor per rank. Invariant: media are fetched from the object store here, so they never pass through
the driver.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import ray

from learner.engine import LearnerEngine, TrainItem
from streams.actorlog import open_actor_log
from streams.messages import (
    MESSAGES_VERSION,
    GroupPayload,
    LearnerSetup,
    ScoreReport,
    TrainBatch,
    TrainReport,
    WeightsUpdate,
)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Learner:
    """Actor class; made a Ray actor by `rl.cluster` with the placement's resources."""

    def __init__(self, fetch_timeout_s: float) -> None:
        open_actor_log()
        self._engine: LearnerEngine | None = None
        self._timeout = fetch_timeout_s
        self._port = _free_port()

    def warm_up(self) -> int:
        """Import what is slow while the driver makes data; returns the pid."""
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("CUDA_VISIBLE_DEVICES") else "cuda")
        import deepspeed  # noqa: F401

        return os.getpid()

    def setup(self, setup: LearnerSetup) -> int:
        """(Re)build the engine for a stage; returns the number of trainable parameters."""
        if setup.messages_version != MESSAGES_VERSION:
            raise ValueError(f"learner speaks messages version {MESSAGES_VERSION}, driver {setup.messages_version}")
        self._engine = None
        self._engine = LearnerEngine(setup, self._port)
        return sum(p.numel() for p in self._engine.backbone.trainable().values())

    def train(self, batch: TrainBatch) -> tuple[TrainReport, WeightsUpdate | None]:
        """One optimiser step; returns the report and the new weights (two objects: the driver reads only the first)."""
        engine = self._ready()
        items = [TrainItem(self._resolve(group.payload), group.advantages) for group in batch.groups]
        report = engine.train(batch.step, batch.loss, items, batch.settings)
        return report, engine.export_weights() if batch.publish else None

    def weights(self) -> WeightsUpdate:
        return self._ready().export_weights()

    def score(self, payloads: tuple[Any, ...]) -> ScoreReport:
        return self._ready().score([self._resolve(payload) for payload in payloads])

    def save(self, path: str, streaming: dict[str, Any]) -> None:
        self._ready().save(Path(path), streaming)

    def load(self, path: str) -> None:
        self._ready().load(Path(path))

    def _ready(self) -> LearnerEngine:
        if self._engine is None:
            raise RuntimeError("the learner was used before setup()")
        return self._engine

    def _resolve(self, payload: Any) -> GroupPayload:
        group = self._get(payload)
        return dataclasses.replace(group, media=self._get(group.media))

    def _get(self, value: Any) -> Any:
        return ray.get(value, timeout=self._timeout) if isinstance(value, ray.ObjectRef) else value

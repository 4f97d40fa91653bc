"""What the streams of one worker are made of: header, layout, turns and position counter, for rollouts and demonstrations.

Invariant: nothing here changes after construction, so every thread may call it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rollout.decode.sampler import stream_seed
from rollout.setup import WorkerSetup
from streams.backbone.backbone import Backbone
from streams.layout.layout import Layout
from streams.log.record import LogHeader
from streams.memory import MemoryConfig, knobs
from streams.positions.mrope import PositionCursor
from streams.task import Plan, StreamTask
from streams.video.reader import Clip
from streams.writing.inputs import turn_inputs
from streams.writing.writer import TurnInput


class StreamRecipe:
    """Makes the parts of a stream from the worker's setup and its backbone's facts; it runs no model."""

    def __init__(self, setup: WorkerSetup, backbone: Backbone) -> None:
        self.setup = setup
        self._backbone = backbone
        self._layouts = {
            empty: backbone.layout.with_config(
                replace(setup.layout, force_empty_thoughts=empty or setup.layout.force_empty_thoughts)
            )
            for empty in (False, True)
        }

    def layout(self, *, empty_thoughts: bool = False) -> Layout:
        """Return the worker's layout, or the one under which every turn's thought is empty."""
        return self._layouts[empty_thoughts]

    def header(
        self, stream_id: str, task_id: str, memory: MemoryConfig, layout: Layout, temperature: float
    ) -> LogHeader:
        return LogHeader(
            stream_id=stream_id,
            task_id=task_id,
            backbone=self._backbone.name,
            policy=memory.name,
            policy_knobs=knobs(memory),
            position_convention=self._backbone.position_convention,
            banned=layout.banned,
            seed=stream_seed(self.setup.run_seed, stream_id),
            temperature=temperature,
            # Greedy streams are scored at 1: at 0 there is no log-prob to compare.
            score_temperature=temperature or 1.0,
        )

    def turns(
        self, task: StreamTask, plan: Plan, clip: Clip, layout: Layout, feature_version: int | None = None
    ) -> tuple[TurnInput, ...]:
        """Return one TurnInput per chunk of the clip. Raises ValueError if a query spells a control token."""
        return turn_inputs(
            task,
            clip,
            layout,
            plan.chunk_seconds,
            self._backbone.image.merge_size,
            feature_version,
        )

    def cursor(self, plan: Plan) -> PositionCursor:
        """Return a fresh position counter."""
        return self._backbone.cursor(self.patch_seconds(plan))

    def patch_seconds(self, plan: Plan) -> float:
        """Return the time between two temporal patches, in seconds."""
        patches = self.setup.video.frames_per_chunk // self._backbone.image.temporal_patch_size
        return plan.chunk_seconds / patches

    def clip_seconds(self, task: StreamTask, plan: Plan) -> float:
        """Return the length of the task's segment in seconds; where its row does not say, that of the plan's turns."""
        if math.isfinite(task.end):
            return task.end - task.start
        return plan.turns * plan.chunk_seconds

"""One large GPU, a model of 3B by its sizes, and the plan of a run on both."""

from __future__ import annotations

from dataclasses import replace

from runtime.planning.device_plan import plan_devices
from streams.support.usage import DeviceInfo
from streams.task import ExpectedAnswer, StreamTask, TimedQuery
from tests.support.configs import composed
from tests.support.geometries import THREE_B

GIB = 2**30
H200 = DeviceInfo("n/gpu", "GPU on n", True, 140 * GIB, 139 * GIB)


def three_b(total=3_754_622_976):
    """Return the shape of Qwen2.5-VL-3B, by its published sizes."""
    parts = {"model.visual.blocks": 668_683_264, "model.language_model": total - 668_683_264}
    return replace(THREE_B, parameters=parts)


def smoke(*overrides):
    """Return experiment=gpu_smoke as it is composed: twenty chunks of 192 video tokens."""
    return composed("experiment=gpu_smoke", *overrides)


AS_SET = ("weights.staging=device", "learner.micro_batch_tokens=16384")
"""Overrides that leave nothing open: an estimate needs them."""
QUESTION = TimedQuery(0.0, "What colour is the shape now?")
TASKS = (StreamTask("a", "a.mp4", 0.0, 20.0, (QUESTION,), (ExpectedAnswer(1.0, "red"),), (), "now"),)


def planned(config, device=H200):
    return plan_devices(config, {"rl": config.learner}, three_b(), TASKS, ([device], [device]))

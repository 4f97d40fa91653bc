"""What the proof of exactness stands on: extreme windows, DeepStack, no fp32 inside fp64, defects that are defects.

The proof itself is `benchmarks.consistency` (tests/benchmarks/test_consistency.py). Its properties are in
tests/streams/test_policies_exact.py, test_causality.py and test_independence.py, and in tests/rollout/test_generate.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streams import memory
from streams.memory import MemoryConfig
from streams.scoring.logprobs import behaviour_differences
from tests.support.exactness.defects import off_by_one, written_again
from tests.support.exactness.rows import POLICIES
from tests.support.streams import (
    CAUGHT,
    FP64_BAR,
    MODEL_TYPES,
    differences,
    joined_features,
    loud_backbone,
    norms_in_input_dtype,
    run,
)
from tests.support.streams import random_requests as streams


@pytest.fixture(scope="module", params=MODEL_TYPES)
def fp32(request, tmp_path_factory):
    return loud_backbone(tmp_path_factory.mktemp("fp32"), torch.float32, request.param)


@pytest.mark.parametrize("window", [1, 50])
@pytest.mark.parametrize("name", ["rcsm", "recent_frames"])
def test_windows_of_one_and_beyond_the_stream_are_exact(fp64, name, window):
    requests = streams(fp64, MemoryConfig(name, window), 4, seed=3)
    assert differences(fp64, run(fp64, requests), requests).max() <= FP64_BAR


def test_no_policy_is_left_out_of_the_exactness_report():
    assert {policy.memory.name for policy in POLICIES} == set(memory.POLICIES)


class TestPlantedDefects:
    """What proves that the defects of benchmarks.consistency are defects: without one, the same machinery finds nothing."""

    CAUGHT = 1000 * FP64_BAR

    @pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
    def test_a_log_written_again_under_its_own_policy_is_the_log(self, fp64, policy):
        requests = streams(fp64, policy.memory, 2, seed=4, low=8)
        for log, r in zip(run(fp64, requests), requests, strict=True):
            again = written_again(fp64, log, r, policy.memory)
            for column in ("ids", "kind", "turn", "segment", "lane", "positions", "expiry", "sampled", "target"):
                assert (getattr(again, column) == getattr(log, column)).all(), column
            assert again.chunks == log.chunks

    def test_each_variant_of_a_wrong_window_is_another_policy(self):
        for policy in POLICIES:
            wrong = off_by_one(policy.memory)
            assert len(set(map(repr, wrong))) == len(wrong)
            assert policy.memory not in wrong
            assert wrong or policy.name in ("full", "random", "text_memory")


@pytest.fixture(scope="module")
def with_levels(tmp_path_factory):
    with norms_in_input_dtype():
        backbone = loud_backbone(tmp_path_factory.mktemp("deepstack"), torch.float64, "qwen3_vl")
        requests = streams(backbone, MemoryConfig("rcsm", 3), 4, seed=10)
        yield backbone, requests, run(backbone, requests)


class TestPlantedDeepstackDefects:
    """DeepStack levels that reach the learner wrongly; the rows of the engine stay what they were."""

    @pytest.mark.parametrize("defect", ["dropped", "last dropped", "wrong layer", "wrong token", "none"])
    def test_each_is_caught(self, with_levels, defect):
        backbone, requests, logs = with_levels
        width = backbone.model.config.text_config.hidden_size

        def damaged(rows):
            main, first, second = rows.split(width, dim=-1)
            empty = torch.zeros_like(first)
            return torch.cat(
                {
                    "dropped": (main, empty, empty),
                    "last dropped": (main, first, empty),
                    "wrong layer": (main, second, first),
                    "wrong token": (main, first.roll(1, 0), second.roll(1, 0)),
                    "none": (main, first, second),
                }[defect],
                dim=-1,
            )

        features = [damaged(joined_features(r)) for r in requests]
        diff = np.abs(np.concatenate(behaviour_differences(backbone, logs, features)))
        assert diff.max() <= FP64_BAR if defect == "none" else diff.max() > CAUGHT

    def test_levels_without_their_layers_are_caught(self, with_levels, monkeypatch):
        """The whole injection forgotten in the learner, as by a forward that knows only embeddings."""
        backbone, requests, logs = with_levels
        place = backbone._place
        monkeypatch.setattr(backbone, "_place", lambda *args: (place(*args)[0], {}))
        assert differences(backbone, logs, requests).max() > CAUGHT


class _NoFloat32(TorchDispatchMode):
    """Collects float32 results of any operation outside the rotary tables (those are the same on both sides)."""

    def __init__(self):
        super().__init__()
        self.allowed = False
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.allowed and isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.found.append(str(func))
        return out


def test_no_fp32_intermediate_is_left_in_the_fp64_forward(fp64):
    mode = _NoFloat32()
    rotary = fp64.model.model.language_model.rotary_emb
    hooks = [
        rotary.register_forward_pre_hook(lambda *_: setattr(mode, "allowed", True)),
        rotary.register_forward_hook(lambda *_: setattr(mode, "allowed", False)),
    ]
    try:
        requests = streams(fp64, MemoryConfig("rcsm", 2), 2, seed=6)
        with mode:
            logs = run(fp64, requests)
            differences(fp64, logs, requests)
    finally:
        for hook in hooks:
            hook.remove()
    assert set(mode.found) == set()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_the_norm_patch_the_detector_does_find_fp32(tmp_path, model_type):
    backbone = loud_backbone(tmp_path, torch.float64, model_type)
    mode = _NoFloat32()
    with mode:
        run(backbone, streams(backbone, MemoryConfig("full"), 1, seed=6))
    assert mode.found

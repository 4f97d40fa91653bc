"""Train-inference exactness on the real tiny modules: the engine's log-probs are the learner's, for every policy.

fp64 is the proof (1e-10), fp32 the sanity row. Every planted defect must miss the fp64 bar a thousandfold: a bar that a
wrong mask also passes would prove nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.engine import Engine
from streams.log import NEVER, Kind
from streams.memory import MemoryConfig
from streams.scoring.logprobs import behaviour_differences
from tests.streams_lib import (
    MODEL_TYPES,
    brute_force_expiry,
    differences,
    joined_features,
    loud_backbone,
    norms_in_input_dtype,
    random_turns,
    request,
    run,
)
from tests.streams_lib import random_requests as streams

FP64_BAR = 1e-10
POLICIES = [MemoryConfig("full"), MemoryConfig("rcsm", 3), MemoryConfig("recent_frames", 3)]
NAMES = [policy.name for policy in POLICIES]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def fp64(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("fp64"), torch.float64, request.param)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def fp32(request, tmp_path_factory):
    return loud_backbone(tmp_path_factory.mktemp("fp32"), torch.float32, request.param)


def rescored_with(backbone, logs, requests, expiry_of):
    """Mismatch of logs whose expiry was replaced by a defective one."""
    wrong = [
        dataclasses.replace(log, expiry=expiry_of(log, r).astype(np.int32))
        for log, r in zip(logs, requests, strict=True)
    ]
    return differences(backbone, wrong, requests)


@pytest.mark.slow
@pytest.mark.parametrize("memory", POLICIES, ids=NAMES)
def test_fp64_engine_equals_one_masked_forward(fp64, memory):
    requests = streams(fp64, memory, 60, seed=1, low=8)
    logs = run(fp64, requests)
    diff = differences(fp64, logs, requests)
    assert len(diff) >= 3400, "the three policies together must reach 10,000 sampled tokens"
    assert diff.max() <= FP64_BAR
    assert sum((log.kind == Kind.QUERY).any() for log in logs) > 20
    assert sum(int((log.sampled & (log.kind == Kind.END)).sum()) for log in logs) > 50, "ends that were sampled"
    assert sum(int((~log.sampled & np.isin(log.kind, (Kind.THINK, Kind.END))).sum()) for log in logs) > 100, "forced"
    if memory.name != "full":
        assert all((log.expiry < len(log)).any() for log in logs), "every stream must have evicted"


@pytest.mark.parametrize("memory", POLICIES, ids=NAMES)
def test_fp32_engine_is_within_rounding_of_one_masked_forward(fp32, memory):
    requests = streams(fp32, memory, 16, seed=2)
    diff = differences(fp32, run(fp32, requests), requests)
    assert diff.max() <= 3e-4
    assert diff.mean() <= 1e-5


@pytest.mark.parametrize("window", [1, 50])
@pytest.mark.parametrize("name", ["rcsm", "recent_frames"])
def test_windows_of_one_and_beyond_the_stream_are_exact(fp64, name, window):
    requests = streams(fp64, MemoryConfig(name, window), 4, seed=3)
    assert differences(fp64, run(fp64, requests), requests).max() <= FP64_BAR


@pytest.fixture(scope="module", params=POLICIES[1:], ids=NAMES[1:])
def evicting(request, fp64):
    requests = streams(fp64, request.param, 6, seed=4, low=8)
    return request.param, requests, run(fp64, requests)


class TestPlantedDefects:
    """Each defect is planted where it would stand in a real system and must be caught a thousandfold."""

    CAUGHT = 1000 * FP64_BAR

    def test_a_plain_causal_mask_is_caught(self, fp64, evicting):
        _, requests, logs = evicting
        diff = rescored_with(fp64, logs, requests, lambda log, r: np.full(len(log), NEVER))
        assert diff.max() > self.CAUGHT

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_a_window_off_by_one_turn_is_caught(self, fp64, evicting, shift):
        memory, requests, logs = evicting
        wrong = MemoryConfig(memory.name, memory.window + shift)
        diff = rescored_with(fp64, logs, requests, lambda log, r: brute_force_expiry(log, r.turns, wrong, fp64.layout))
        assert diff.max() > self.CAUGHT

    def test_a_turn_that_starts_at_its_video_is_caught(self, fp64, evicting):
        _, requests, logs = evicting

        def late(log, r):
            expiry = log.expiry.astype(np.int64)
            for turn in range(1, log.num_turns):
                start = int(np.flatnonzero(log.turn == turn)[0])
                video = np.flatnonzero((log.turn == turn) & (log.kind == Kind.VIDEO))
                if len(video):
                    expiry[log.expiry == start] = video[0]
            return expiry

        assert rescored_with(fp64, logs, requests, late).max() > self.CAUGHT

    def test_an_end_token_forwarded_after_eviction_is_caught(self, fp64, evicting, monkeypatch):
        _, requests, _ = evicting
        right = Engine._gather

        def late_end(self, stream, step):
            """The published off-by-one: END rides in the next turn's prefill, after its eviction."""
            add = Engine._add_segment
            over = stream.writer.state is not None and stream.writer.state.over
            skipped = [over and stream.forwarded < stream.writer.log.length]

            def skip_first(self, stream, step):
                if skipped[0]:
                    skipped[0] = False
                    return
                add(self, stream, step)

            monkeypatch.setattr(Engine, "_add_segment", skip_first)
            try:
                right(self, stream, step)
            finally:
                monkeypatch.setattr(Engine, "_add_segment", add)

        monkeypatch.setattr(Engine, "_gather", late_end)
        logs = run(fp64, requests)
        assert differences(fp64, logs, requests).max() > self.CAUGHT

    @pytest.mark.parametrize("memory", POLICIES, ids=NAMES)
    def test_a_ban_list_missing_in_the_learner_is_caught(self, fp64, memory, monkeypatch):
        requests = streams(fp64, memory, 4, seed=5)
        logs = run(fp64, requests)
        monkeypatch.setattr(fp64, "_ban_index", torch.tensor([], dtype=torch.long))
        assert differences(fp64, logs, requests).max() > self.CAUGHT

    def test_the_brute_force_rule_itself_is_what_the_engine_logged(self, fp64, evicting):
        """The null of the defects above: the same machinery without a defect finds nothing."""
        memory, requests, logs = evicting
        diff = rescored_with(fp64, logs, requests, lambda log, r: brute_force_expiry(log, r.turns, memory, fp64.layout))
        assert diff.max() <= FP64_BAR


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
        assert diff.max() <= FP64_BAR if defect == "none" else diff.max() > TestPlantedDefects.CAUGHT

    def test_levels_without_their_layers_are_caught(self, with_levels, monkeypatch):
        """The whole injection forgotten in the learner, as by a forward that knows only embeddings."""
        backbone, requests, logs = with_levels
        place = backbone._place
        monkeypatch.setattr(backbone, "_place", lambda *args: (place(*args)[0], {}))
        assert differences(backbone, logs, requests).max() > TestPlantedDefects.CAUGHT


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


@pytest.mark.parametrize("memory", POLICIES, ids=NAMES)
def test_streams_do_not_depend_on_what_else_runs(fp64, memory):
    requests = streams(fp64, memory, 6, seed=7)
    together = run(fp64, requests)
    for alone, among in zip((run(fp64, [r])[0] for r in requests), together, strict=True):
        assert (alone.ids == among.ids).all()
        assert (alone.expiry == among.expiry).all()
        np.testing.assert_allclose(alone.behaviour_logp, among.behaviour_logp, atol=FP64_BAR)


@pytest.mark.parametrize("memory", POLICIES, ids=NAMES)
def test_the_future_changes_nothing_before_it(fp64, memory):
    rng = np.random.default_rng(8)
    turns = random_turns(fp64, rng, 8)
    first = run(fp64, [request(fp64, memory, turns, "s", feature_seed=1)])[0]
    others = random_turns(fp64, np.random.default_rng(9), 8)
    changed = request(fp64, memory, (*turns[:5], *others[5:]), "s", feature_seed=1)
    second = run(fp64, [changed])[0]
    cut = int(np.flatnonzero(first.turn == 5)[0])
    assert (first.ids[:cut] == second.ids[:cut]).all()
    np.testing.assert_allclose(first.behaviour_logp[:cut], second.behaviour_logp[:cut], atol=FP64_BAR)
    assert not (len(first) == len(second) and (first.ids == second.ids).all()), "the future must really differ"

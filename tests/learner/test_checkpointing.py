"""Activation checkpointing: the same loss and gradients from less memory; dropout is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.long_streams.activation_checkpointing import checkpoint_activations
from learner.setup import LearnerSetup
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.tiny import build_tiny
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig
from streams.messages import GroupPayload
from streams.scoring.logprobs import score_rows
from streams.scoring.packing import pack
from tests.support.learner import GRPO, even
from tests.support.streams import MODEL_TYPES, joined_features, loud_backbone, random_turns, request, run

LAYOUT = LayoutConfig(think_budget=5, max_new_tokens=10)


@pytest.fixture(params=MODEL_TYPES)
def fp64(request, tmp_path):
    return loud_backbone(tmp_path, torch.float64, request.param)


class HeldBytes:
    """Counts what autograd keeps for the backward pass: tensors that are no parameters, each storage once."""

    def __init__(self, backbone):
        self._own = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
        self._seen: dict[int, torch.UntypedStorage] = {}

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._hooks.__enter__()
        return self

    def __exit__(self, *details):
        self._hooks.__exit__(*details)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            # Held on to, so that no two of them ever share an address.
            self._seen[storage.data_ptr()] = storage
        return tensor

    @property
    def total(self):
        return sum(storage.nbytes() for storage in self._seen.values())


def step(backbone, rows, clips):
    """(loss, gradients, bytes held): features come from frames through the tower, as when it trains."""
    backbone.model.zero_grad()
    backbone.model.train()
    with HeldBytes(backbone) as held:
        features = torch.cat([encoded.flatten(0, 1) for encoded in backbone.encode_video(clips)])
        loss = score_rows(backbone, rows, features).logp.mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, held.total


@pytest.fixture
def batch(fp64):
    """Packed rows whose streams have evicted, and clips with as many tokens as each of them shows."""
    rng = np.random.default_rng(0)
    requests = [
        request(fp64, MemoryConfig("rcsm", 2), random_turns(fp64, rng, 7), f"s{i}", feature_seed=i) for i in range(3)
    ]
    logs = run(fp64, requests)
    assert all((log.expiry < len(log)).any() for log in logs)
    side = fp64.image.patch_size * fp64.image.merge_size
    clips = [
        rng.integers(0, 255, (len(joined_features(r)), fp64.image.temporal_patch_size, side, side, 3), np.uint8)
        for r in requests
    ]
    return pack(logs, [[0, 1], [2]]), clips


@pytest.mark.parametrize("freeze", ["none", "tower", "tower+merger"])
def test_loss_and_gradients_are_equal_and_less_is_held(fp64, batch, freeze):
    rows, clips = batch
    fp64.freeze(freeze)
    loss, gradients, held = step(fp64, rows, clips)
    blocks = len(fp64.model.model.visual.blocks)
    layers = len(fp64.model.model.language_model.layers)
    assert checkpoint_activations(fp64) == layers + (blocks if freeze == "none" else 0)
    again, recomputed, less = step(fp64, rows, clips)
    torch.testing.assert_close(again, loss, atol=1e-12, rtol=0)
    assert recomputed.keys() == gradients.keys()
    assert any(".visual." in name for name in gradients) == (freeze != "tower+merger")
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-12, rtol=1e-12, msg=name)
    assert less < 0.6 * held


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_learner_step_is_the_same_at_every_zero_stage(tmp_path, ranks, stage):
    """At stage 3 a layer's parameters are gathered once more to compute it again."""
    backbone = loud_backbone(tmp_path, torch.float32, layout=LAYOUT)
    rng = np.random.default_rng(1)
    made = [request(backbone, MemoryConfig("rcsm", 2), random_turns(backbone, rng, 6), f"s{i}") for i in range(2)]
    items = [
        even(GroupPayload((log,), "features", to_array(joined_features(r)[None])), (advantage,))
        for r, log, advantage in zip(made, run(backbone, made), (1.0, -1.0), strict=True)
    ]
    found = []
    for recompute in (False, True):
        config = LearnerConfig(freeze="tower+merger", zero_stage=stage, activation_checkpointing=recompute)
        setup = LearnerSetup(str(backbone.source), LAYOUT, config, total_steps=2, seed=0)
        learner = LearnerEngine(setup, ranks)
        learner.backbone.layout.banned = backbone.layout.banned
        found.append(learner.train(0, GRPO, items).metrics)
        learner.close()
    assert found[0]["grad_norm"] > 0
    for name in ("loss", "grad_norm", "entropy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name


def test_nothing_is_recomputed_outside_training(fp64, batch):
    rows, clips = batch
    _, _, held = step(fp64, rows, clips)
    checkpoint_activations(fp64)
    fp64.model.eval()
    with HeldBytes(fp64) as kept, torch.no_grad():
        score_rows(fp64, rows, torch.cat([c.flatten(0, 1) for c in fp64.encode_video(clips)]))
    assert held > 0
    assert kept.total == 0


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_checkpoint_with_dropout_is_refused(tmp_path, part):
    path = build_tiny(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    config[part]["attention_dropout"] = 0.1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json has {part}.attention_dropout=0.1; set it to 0"):
        Backbone.load(path, LayoutConfig())

"""Random weights: small models as they always were, large ones by all cores, whatever the number of these."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
import time

import pytest
import torch

from streams.backbone import tiny
from streams.backbone.tiny import initialise


class Shapes(torch.nn.Module):
    """Every kind of parameter that `initialise` tells apart."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(300, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.proj = torch.nn.Linear(64, 200)
        self.patch = torch.nn.Conv3d(3, 32, (2, 4, 4))


def drawn(seed=3, dtype=torch.float32):
    model = Shapes().to(dtype)
    initialise(model, seed, gain=2.0, embedding_std=0.3)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def large(monkeypatch):
    """The shapes count as a large model, in several slices each."""
    monkeypatch.setattr(tiny, "LARGE", 1)
    monkeypatch.setattr(tiny, "DRAWN_AT_ONCE", 1000)


def test_a_small_model_is_what_one_generator_draws_parameter_by_parameter():
    wanted = Shapes()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        wanted.embed_tokens.weight.normal_(0.0, 0.3, generator=generator)
        for layer in (wanted.proj, wanted.patch):
            torch.nn.init.xavier_uniform_(layer.weight.flatten(1), gain=2.0, generator=generator)
            layer.bias.normal_(0.0, 0.02, generator=generator)
    for name, parameter in drawn().items():
        assert torch.equal(parameter, dict(wanted.named_parameters())[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_model_depends_on_the_seed_and_not_on_the_cores(large, monkeypatch, dtype):
    found = {}
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        found[cores] = drawn(dtype=dtype)
    assert all(torch.equal(found[1][name], found[3][name]) for name in found[1])
    other = drawn(seed=4, dtype=dtype)
    same = [name for name in other if torch.equal(other[name], found[1][name])]
    assert same == ["norm.weight", "norm.bias"]


def test_a_large_model_has_the_spread_of_a_small_one_in_every_slice(large):
    found = drawn()
    for name, std in (
        ("embed_tokens.weight", 0.3),
        ("proj.weight", 2.0 * math.sqrt(2.0 / 264)),
        ("patch.weight", 2.0 * math.sqrt(2.0 / (32 + 96))),
    ):
        for part in found[name].view(-1).split(1000):
            if len(part) == 1000:
                assert abs(float(part.mean())) < 5 * std / 1000**0.5
                assert float(part.std()) == pytest.approx(std, rel=0.1)
    bound = 2.0 * math.sqrt(6.0 / 264)
    assert bound * 0.99 < float(found["proj.weight"].abs().max()) <= bound
    assert float(found["proj.bias"].std()) == pytest.approx(0.02, rel=0.3)
    parts = [hashlib.sha256(part.numpy().tobytes()).digest() for part in found["proj.weight"].view(-1).split(1000)]
    assert len(set(parts)) == len(parts)
    assert torch.equal(found["norm.weight"], torch.ones(64))


def test_python_runs_on_while_numbers_are_drawn():
    """What drawing by several threads rests on: that a draw holds no lock of Python's."""
    numbers, began, seen, draws = torch.empty(2**20), threading.Event(), threading.Event(), 0

    def draw():
        nonlocal draws
        generator = torch.Generator().manual_seed(1)
        began.set()
        # Draws until the other thread has been seen, as a busy machine may let it wait for one draw or for many.
        while draws < 1000 and not seen.is_set():
            torch.nn.init.normal_(numbers, generator=generator)
            draws += 1

    before = sys.getswitchinterval()
    # So that nobody is made to let go of the lock: if a draw held it, all of them would be over before a line runs here.
    sys.setswitchinterval(300.0)
    try:
        thread = threading.Thread(target=draw)
        thread.start()
        assert began.wait(30.0)
        time.sleep(1e-4)
        seen.set()
        thread.join(60.0)
    finally:
        sys.setswitchinterval(before)
    assert draws < 1000

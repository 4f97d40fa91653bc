"""A pool that runs full: the youngest are given back and begin anew, and write the same logs; first prefills are shared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.engine.engine import Engine
from rollout.engine.request import stream_bound
from streams.backbone.kernel_choice import Choice
from streams.memory import make_policy
from tests.support.exactness.rows import POLICIES
from tests.support.gather_attention import GatherBackend
from tests.support.logs import assert_same_log
from tests.support.streams import loud_backbone, norms_in_input_dtype, random_turns, request

NAMES = [f"{p.name}-{p.positions}-{p.memory.text_window}" for p in POLICIES]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("preemption"), torch.float64)


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.setattr("rollout.engine.engine.choose_rollout_attention", lambda *_: Choice("flashinfer", "test"))
    monkeypatch.setattr("rollout.engine.engine.make_backend", lambda name, pool, groups: GatherBackend(pool, groups))


def group(backbone, memory, count, seed, turns=5):
    """Streams of one group: the same turns and features, seeds of their own."""
    shown = random_turns(backbone, np.random.default_rng(seed), turns)
    first = request(backbone, memory, shown, f"g{seed}/0", feature_seed=seed)
    others = [request(backbone, memory, shown, f"g{seed}/{i}", feature_seed=seed) for i in range(1, count)]
    return [first, *(replace(r, features=first.features, policy=make_policy(memory)) for r in others)]


def alone(requests):
    """The same requests with features of their own, which share nothing."""
    return [replace(r, features=tuple(f.clone() for f in r.features)) for r in requests]


def assert_same(found, wanted):
    """Equal in all columns, and in log-probs but for rounding."""
    np.testing.assert_allclose(found.behaviour_logp, wanted.behaviour_logp, rtol=0, atol=1e-10)
    assert_same_log(replace(found, behaviour_logp=wanted.behaviour_logp), wanted)


def run(backbone, requests, slots):
    engine = Engine(backbone, slots, 16)
    for r in requests:
        engine.add(r)
    logs, oldest, preempted = {}, None, []
    while engine.busy:
        if engine.admission.running:
            oldest = engine.admission.running[0].id
        for log in engine.step():
            logs[log.header.stream_id] = log
        given_back = engine.admission.take_preempted()
        assert oldest not in given_back
        preempted += given_back
    assert engine.pool.available == engine.pool.capacity
    assert engine.pool.book.fits(slots, slots, keeps=True), "nothing stays promised"
    return engine, logs, preempted


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_streams_that_begin_anew_write_the_logs_of_a_pool_with_room(backbone, pages, policy):
    requests = group(backbone, policy.memory, 3, 1) + group(backbone, policy.memory, 2, 2)
    _, wanted, none = run(backbone, requests, 20000)
    assert none == []
    smallest = max(stream_bound(r) for r in requests)
    _, found, preempted = run(backbone, requests, smallest)
    assert preempted
    assert found.keys() == wanted.keys()
    for name, log in found.items():
        assert_same(log, wanted[name])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[5], POLICIES[6]], ids=[NAMES[1], NAMES[5], NAMES[6]])
def test_a_group_prefills_its_first_turn_once_and_writes_the_same_logs(backbone, request, policy, paged):
    if paged:
        request.getfixturevalue("pages")
    requests = group(backbone, policy.memory, 4, 3)
    apart, wanted, _ = run(backbone, alone(requests), 20000)
    together, found, _ = run(backbone, requests, 20000)
    assert apart.shared == 0
    assert together.shared > 0
    assert together.shared % 3 == 0, "three of four were saved"
    assert together.prefilled + together.shared == apart.prefilled
    copies = not paged or policy.positions == "contiguous"
    assert (together.pool.copied_bytes > apart.pool.copied_bytes) == copies
    for name, log in found.items():
        assert_same(log, wanted[name])

"""A pool that runs full: the youngest are given back and begin anew, and write the same logs; first prefills are shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.engine.admission import Admission
from rollout.engine.engine import Engine
from rollout.engine.request import Stream, StreamRequest, stream_bound
from streams.backbone.backbone import Backbone
from streams.log.record import StreamLog
from streams.memory import MemoryConfig, make_policy
from streams.writing.writer import QueryInput, TurnInput
from tests.support.exactness.rows import POLICIES
from tests.support.logs import assert_same_log
from tests.support.pages import use_pages
from tests.support.recorded_steps import replay_on_pages
from tests.support.streams import (
    FP64_BAR,
    MODEL_TYPES,
    chunk_record,
    differences,
    loud_backbone,
    norms_in_input_dtype,
    random_requests,
    random_turns,
    request,
)

NAMES = [f"{p.name}-{p.positions}-{p.memory.text_window}" for p in POLICIES]
STEPS = (1, 3, 8)
"""Decode steps of a visit."""
ROOM = 20000
"""Slots with which nothing is given back."""


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("preemption"), torch.float64, request.param)


@pytest.fixture
def pages(monkeypatch):
    """Pages, and an admission that expects no growth: so many streams are given back."""
    use_pages(monkeypatch)
    monkeypatch.setattr("rollout.engine.admission._expected", lambda stream, share: 0)


@pytest.fixture(params=[False, True], ids=["blocks", "pages"])
def paged(request, monkeypatch):
    if request.param:
        use_pages(monkeypatch)
    return request.param


def group(backbone, memory, count, seed, turns=5):
    """Streams of one group: the same turns and features, seeds of their own."""
    shown = random_turns(backbone, np.random.default_rng(seed), turns)
    first = request(backbone, memory, shown, f"g{seed}/0", feature_seed=seed)
    others = [request(backbone, memory, shown, f"g{seed}/{i}", feature_seed=seed) for i in range(1, count)]
    return [first, *(replace(r, features=first.features, policy=make_policy(memory)) for r in others)]


def alone(requests):
    """The same requests with features of their own, which share nothing."""
    return [replace(r, features=tuple(f.clone() for f in r.features)) for r in requests]


def assert_same(found: StreamLog, wanted: StreamLog) -> None:
    """Equal in all columns, and in log-probs but for rounding."""
    np.testing.assert_allclose(found.behaviour_logp, wanted.behaviour_logp, rtol=0, atol=FP64_BAR)
    assert_same_log(replace(found, behaviour_logp=wanted.behaviour_logp), wanted)


def run(
    backbone: Backbone,
    requests: list[StreamRequest],
    slots: int,
    decode_steps: int = 8,
    after: Callable[[Engine, list[str]], None] = lambda engine, given_back: None,
) -> tuple[Engine, dict[str, StreamLog], list[str]]:
    """Run to the end; returns engine, logs, and who was given back. after: called with those of each visit."""
    engine = Engine(backbone, slots, 16, decode_steps=decode_steps)
    for r in requests:
        engine.add(r)
    logs: dict[str, StreamLog] = {}
    oldest, preempted = None, []
    while engine.busy:
        if engine.admission.running:
            oldest = engine.admission.running[0].id
        for log in engine.step():
            logs[log.header.stream_id] = log
        given_back = engine.admission.take_preempted()
        assert oldest not in given_back
        preempted += given_back
        after(engine, given_back)
    assert engine.pool.available == engine.pool.capacity
    assert engine.pool.book.fits(slots, slots, keeps=True), "nothing stays promised"
    return engine, logs, preempted


def assert_a_small_pool_changes_nothing(backbone: Backbone, memory: MemoryConfig, seed: int) -> None:
    """Two groups in a pool with room for one stream, and in somewhat larger ones, with any decode steps."""

    def made() -> list[StreamRequest]:
        return group(backbone, memory, 2, 10 * seed + 1) + group(backbone, memory, 2, 10 * seed + 2)

    _, wanted, none = run(backbone, made(), ROOM)
    assert none == []
    smallest = max(stream_bound(r) for r in made())
    for decode_steps, slots in zip(STEPS, (smallest, smallest + 7, smallest + smallest // 2), strict=True):
        _, found, preempted = run(backbone, made(), slots, decode_steps)
        assert preempted or slots > smallest
        assert found.keys() == wanted.keys()
        for name, log in found.items():
            assert_same(log, wanted[name])


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_streams_that_begin_anew_write_the_logs_of_a_pool_with_room(backbone, pages, policy):
    assert_a_small_pool_changes_nothing(backbone, policy.memory, 0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_so_they_do_for_another_seed(backbone, pages, policy):
    assert_a_small_pool_changes_nothing(backbone, policy.memory, 1)


@pytest.mark.parametrize("decode_steps", STEPS)
def test_streams_of_all_policies_share_a_small_pool(backbone, pages, decode_steps):
    """Native and contiguous positions, lanes, greedy and sampled, in one pool that runs full again and again."""

    def made() -> list[StreamRequest]:
        rng = np.random.default_rng(0)
        shown = [random_turns(backbone, rng, int(rng.integers(3, 7))) for _ in range(12)]
        return [
            request(backbone, POLICIES[i % len(POLICIES)].memory, turns, f"all/{i}", temperature=(1.0, 0.0, 2.0)[i % 3])
            for i, turns in enumerate(shown)
        ]

    _, wanted, _ = run(backbone, made(), ROOM)
    _, found, preempted = run(backbone, made(), max(stream_bound(r) for r in made()), decode_steps)
    assert len(preempted) > 3
    assert found.keys() == wanted.keys()
    for name, log in found.items():
        assert_same(log, wanted[name])


def test_decode_steps_that_are_replayed_write_the_same_logs_in_a_small_pool(backbone, monkeypatch):
    """As with CUDA graphs: the seat of a stream that was given back in its turn stays in the buffers, and does nothing."""

    def made() -> list[StreamRequest]:
        return group(backbone, POLICIES[2].memory, 3, 1) + group(backbone, POLICIES[6].memory, 3, 2)

    _, wanted, _ = run(backbone, made(), ROOM)
    replay_on_pages(monkeypatch)
    monkeypatch.setattr("rollout.engine.admission._expected", lambda stream, share: 0)
    engine, found, preempted = run(backbone, made(), max(stream_bound(r) for r in made()), 3)
    assert engine.graphs.name == "graphs"
    assert preempted
    assert found.keys() == wanted.keys()
    for name, log in found.items():
        assert_same(log, wanted[name])


def test_whoever_was_given_back_waits_for_more_room_than_it_had(backbone, pages, monkeypatch):
    """So it comes further each time, and streams at the brim do not take turns."""
    needs: dict[str, list[int]] = {}

    def give_back(admission: Admission, stream: Stream, again: Stream) -> None:
        assert again.need > stream.slots.owned or again.need == again.bound
        needs.setdefault(stream.id, []).append(again.need)
        given_back(admission, stream, again)

    given_back = Admission.give_back
    monkeypatch.setattr(Admission, "give_back", give_back)
    requests = group(backbone, POLICIES[0].memory, 6, 1, turns=7)
    run(backbone, requests, max(stream_bound(r) for r in requests))
    assert any(len(found) > 1 for found in needs.values())
    for found in needs.values():
        assert found == sorted(found)


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2]], ids=[NAMES[0], NAMES[2]])
def test_fewer_are_given_back_once_some_have_ended(backbone, monkeypatch, policy):
    use_pages(monkeypatch)

    def made() -> list[StreamRequest]:
        return alone(group(backbone, policy.memory, 10, 1, turns=6))

    slots = 2 * max(stream_bound(r) for r in made())
    expecting, found, fewer = run(backbone, made(), slots)
    monkeypatch.setattr("rollout.engine.admission._expected", lambda stream, share: 0)
    careless, wanted, more = run(backbone, made(), slots)
    assert 0 < len(fewer) < len(more) / 1.5
    assert expecting.prefilled < careless.prefilled
    for name, log in found.items():
        assert_same(log, wanted[name])


@pytest.fixture
def louder(backbone):
    """A function that changes the weights in place, as a swap does; they are as before at the end."""
    parameter = backbone.model.model.language_model.layers[0].mlp.up_proj.weight
    before = parameter.detach().clone()

    def change(version: int) -> None:
        with torch.no_grad():
            parameter.copy_(before * (1 + version / 8))

    yield change
    change(0)


@pytest.mark.parametrize("decode_steps", [1, 8])
@pytest.mark.parametrize("policy", [POLICIES[2], POLICIES[6]], ids=[NAMES[2], NAMES[6]])
def test_what_begins_anew_after_a_swap_is_of_the_new_weights_alone(backbone, pages, louder, policy, decode_steps):
    """Weights change while streams that were given back wait; each token is recorded under those that made it."""

    def made() -> list[StreamRequest]:
        return group(backbone, policy.memory, 3, 5) + group(backbone, policy.memory, 2, 6)

    by_version = []
    for version in range(3):
        louder(version)
        by_version.append(run(backbone, made(), ROOM)[1])
    louder(0)
    began_at_least: dict[str, int] = {r.header.stream_id: 0 for r in made()}

    def swap(engine: Engine, given_back: list[str]) -> None:
        assert not {stream.id for stream in engine.admission.running}.intersection(given_back)
        if given_back and engine.version < 2:
            engine.version += 1
            louder(engine.version)
            began_at_least.update(dict.fromkeys(given_back, engine.version))

    smallest = max(stream_bound(r) for r in made())
    _, found, preempted = run(backbone, made(), smallest, decode_steps, swap)
    assert preempted
    assert set(began_at_least.values()) > {0}
    whole: dict[int, list[str]] = {}
    for name, log in found.items():
        assert (np.diff(log.version) >= 0).all()
        assert log.version[0] >= began_at_least[name], "nothing is left of what was sampled before"
        # A stream is the one of the weights that it began with, up to the next swap.
        of_first = log.version == log.version[0]
        wanted = by_version[log.version[0]][name]
        count = int(of_first.sum())
        np.testing.assert_array_equal(log.ids[:count], wanted.ids[:count])
        np.testing.assert_allclose(log.behaviour_logp[:count], wanted.behaviour_logp[:count], rtol=0, atol=FP64_BAR)
        if log.single_version is not None:
            assert_same(replace(log, version=wanted.version), wanted)
            whole.setdefault(log.single_version, []).append(name)
    assert max(whole) > 0
    by_name = {r.header.stream_id: r for r in made()}
    for version, names in whole.items():
        louder(version)
        scored = differences(backbone, [found[name] for name in names], [by_name[name] for name in names])
        assert scored.max() <= FP64_BAR


@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[5], POLICIES[6]], ids=[NAMES[1], NAMES[5], NAMES[6]])
def test_a_group_prefills_its_first_turn_once_and_writes_the_same_logs(backbone, policy, paged):
    requests = group(backbone, policy.memory, 4, 3)
    apart, wanted, _ = run(backbone, alone(requests), ROOM)
    together, found, _ = run(backbone, requests, ROOM)
    assert apart.shared == 0
    assert together.shared > 0
    assert together.shared % 3 == 0, "three of four were saved"
    assert together.prefilled + together.shared == apart.prefilled
    copies = not paged or policy.positions == "contiguous"
    assert (together.pool.copied_bytes > apart.pool.copied_bytes) == copies
    for name, log in found.items():
        assert_same(log, wanted[name])


def test_only_what_is_equal_to_the_last_number_is_shared(backbone, paged):
    """First prefills that look alike and are not: in one word, the shape of a chunk, its features, or a forced thought."""
    memory = POLICIES[1].memory

    def asked(name: str, grid=(1, 1, 2), words=(65, 66, 67)) -> StreamRequest:
        turns = tuple(TurnInput(chunk_record(i, grid), QueryInput(words) if i == 0 else None) for i in range(3))
        return request(backbone, memory, turns, name, feature_seed=0)

    silent = backbone.layout.with_config(replace(backbone.layout.config, force_empty_thoughts=True))
    silent.banned = backbone.layout.banned
    first = asked("first")
    different = [
        asked("words", words=(65, 66, 68)),
        asked("shape", grid=(1, 2, 1)),
        asked("film"),
        replace(asked("thought"), layout=silent),
    ]
    # All but the film with the very same features.
    alike = [first, *(r if r.header.stream_id == "film" else replace(r, features=first.features) for r in different)]
    engine, _, _ = run(backbone, alike, ROOM)
    assert engine.shared == 0
    same = replace(asked("same"), features=first.features)
    again = [replace(r, policy=make_policy(memory)) for r in alike]
    engine, logs, _ = run(backbone, [*again, same], ROOM)
    assert engine.shared == int(np.flatnonzero(logs["same"].sampled)[0])


def test_a_pool_too_small_for_one_stream_is_refused_with_the_arithmetic_and_the_others_run(backbone, pages):
    requests = random_requests(backbone, POLICIES[1].memory, 3)
    bounds = [stream_bound(r) for r in requests]
    largest = int(np.argmax(bounds))
    engine = Engine(backbone, max(bounds) - 1, 4)
    done = set()
    for i, r in enumerate(requests):
        if i == largest:
            with pytest.raises(ValueError, match=rf"may need {bounds[i]} KV slots but the pool holds {bounds[i] - 1}"):
                engine.add(r)
        else:
            engine.add(r)
    while engine.busy:
        done |= {log.header.stream_id for log in engine.step()}
    assert done == {r.header.stream_id for i, r in enumerate(requests) if i != largest}
    assert engine.pool.available == engine.pool.capacity

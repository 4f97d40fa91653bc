"""The engine writes the logs of the one-step engine (tests.support.one_step), whatever a visit of the host covers.

Random turns, policies, layouts and temperatures share one engine; streams join while others run, and some are cancelled.
In fp64 everything but the last digits of the log-probs is equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.engine.engine import Engine
from rollout.engine.feed import TurnFeed
from rollout.engine.forward import forward
from rollout.engine.request import StreamRequest
from rollout.engine.step_plan import StepPlan
from streams.layout.layout import LayoutConfig
from streams.log.record import StreamLog
from streams.memory import MemoryConfig
from streams.writing.writer import QueryInput, TurnInput
from tests.support.exactness.rows import POLICIES, Policy
from tests.support.one_step import OneStepEngine
from tests.support.pages import use_pages
from tests.support.recorded_steps import replay_on_pages
from tests.support.streams import MODEL_TYPES, chunk_record, loud_backbone, norms_in_input_dtype, random_turns, request

STEPS = (1, 3, 8)
"""Decode steps of a visit."""
LAYOUTS = (
    LayoutConfig(think_budget=5, max_new_tokens=10),
    LayoutConfig("Watch.", think_budget=2, max_new_tokens=4),
    LayoutConfig(think_budget=12, max_new_tokens=16),
    LayoutConfig(think_budget=5, max_new_tokens=9, force_empty_thoughts=True),
    LayoutConfig(think_budget=7, max_new_tokens=9),
)
TEMPERATURES = (1.0, 0.0, 0.7, 3.0)
POLICY_NAMES = [f"{p.name}-{p.positions}-{p.memory.text_window}" for p in POLICIES]
LOGP_BAR = 1e-10


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("equivalence"), torch.float64, request.param)


def engines(backbone, **settings) -> list[tuple[str, Callable[[], Engine]]]:
    """The engines to be compared with the reference, by name."""
    return [(f"{n} steps", lambda n=n: Engine(backbone, decode_steps=n, **settings)) for n in STEPS]


def one_request(backbone, rng: np.random.Generator, memory: MemoryConfig, name: str) -> StreamRequest:
    """A random stream with a layout and a temperature of its own; `rng` is used alike at every call."""
    layout = backbone.layout.with_config(LAYOUTS[rng.integers(len(LAYOUTS))])
    layout.banned = backbone.layout.banned
    temperature = float(rng.choice(TEMPERATURES))
    turns = random_turns(backbone, rng, int(rng.integers(1, 9)))
    made = request(backbone, memory, turns, name, temperature=temperature)
    return replace(made, layout=layout)


def random_streams(backbone, memories: list[MemoryConfig], count: int, seed: int) -> list[StreamRequest]:
    """Made anew for every engine: a policy belongs to one stream."""
    rng = np.random.default_rng(seed)
    return [one_request(backbone, rng, memories[i % len(memories)], f"eq{seed}/{i}") for i in range(count)]


def run(engine: Engine | OneStepEngine, requests: list[StreamRequest], seed: int = 0) -> dict[str, StreamLog]:
    """By name, the streams that were not cancelled; half join while others run, the last but one is cancelled on its way."""
    rng = np.random.default_rng(seed)
    waiting = list(requests)
    cancelled = requests[-2].header.stream_id if len(requests) > 3 else None
    logs: dict[str, StreamLog] = {}
    while waiting or engine.busy:
        joining = len(requests) // 2 if len(waiting) == len(requests) else int(rng.integers(0, 2))
        for made in waiting[:joining]:
            engine.add(made)
        del waiting[:joining]
        for log in engine.step():
            assert log.header.stream_id not in logs
            logs[log.header.stream_id] = log
        if cancelled is not None and not waiting:
            engine.cancel({cancelled})
            cancelled = None
    assert engine.take_failed() == []
    assert engine.pool.available == engine.pool.capacity
    # It may have ended before: then one engine has its log and another has not.
    if len(requests) > 3:
        logs.pop(requests[-2].header.stream_id, None)
    return logs


def assert_same(ours: StreamLog, reference: StreamLog) -> None:
    """All columns and moves are equal, and log-probs within LOGP_BAR."""
    assert ours.header == reference.header
    assert ours.chunks == reference.chunks
    for column in fields(StreamLog):
        if column.name in ("header", "chunks", "regions", "behaviour_logp"):
            continue
        left, right = getattr(ours, column.name), getattr(reference, column.name)
        assert left.dtype == right.dtype, column.name
        np.testing.assert_array_equal(left, right, err_msg=f"{ours.header.stream_id}: {column.name}")
    np.testing.assert_allclose(ours.behaviour_logp, reference.behaviour_logp, rtol=0, atol=LOGP_BAR)
    assert (ours.regions is None) == (reference.regions is None)
    if ours.regions is not None and reference.regions is not None:
        for column in fields(type(ours.regions)):
            left, right = getattr(ours.regions, column.name), getattr(reference.regions, column.name)
            np.testing.assert_array_equal(left, right, err_msg=f"regions.{column.name}")


def compare(backbone, memories: list[MemoryConfig], count: int, seed: int, **settings) -> list[StreamLog]:
    wanted = run(OneStepEngine(backbone, **settings), random_streams(backbone, memories, count, seed))
    for name, make in engines(backbone, **settings):
        found = run(make(), random_streams(backbone, memories, count, seed), seed + 1)
        assert found.keys() == wanted.keys(), name
        for stream, log in found.items():
            assert_same(log, wanted[stream])
    return list(wanted.values())


@pytest.mark.parametrize("policy", POLICIES, ids=POLICY_NAMES)
def test_a_policys_logs_are_those_of_the_one_step_engine(backbone, policy: Policy):
    logs = compare(backbone, [policy.memory], 7, 3, kv_slots=8000, max_streams=4)
    assert sum(log.sampled.sum() for log in logs) > 50
    if policy.name != "full":
        assert any(log.evicted_tokens for log in logs)


@pytest.mark.parametrize("seed", range(3))
def test_streams_of_all_policies_and_layouts_share_an_engine(backbone, seed):
    """Lanes, native and contiguous positions, greedy and sampled, forced and free thoughts in one row."""
    logs = compare(backbone, [p.memory for p in POLICIES], 2 * len(POLICIES), seed, kv_slots=20000, max_streams=11)
    assert {log.header.temperature for log in logs} == set(TEMPERATURES)
    assert any((log.lane == 1).any() for log in logs)
    assert any(log.regions is not None for log in logs)


def test_a_pool_with_room_for_few_streams_changes_no_token(backbone):
    memories = [MemoryConfig("rcsm", 2), MemoryConfig("sink_window", 2, 3, 4, 4)]
    compare(backbone, memories, 8, 5, kv_slots=900, max_streams=16)


def test_keys_that_change_slot_and_position_in_one_row(backbone, monkeypatch):
    """Long questions leave and little comes: late keys close the gap, and are turned where they went."""
    both = 0

    def counted(plan: StepPlan, *given: Any) -> torch.Tensor:
        nonlocal both
        moved = {int(slot) for slots in plan.moved_to for slot in slots}
        both += len(moved.intersection(int(slot) for slots in plan.moved_keys._slots for slot in slots))
        return forward(plan, *given)

    monkeypatch.setattr("rollout.engine.engine.forward", counted)
    memory = MemoryConfig("sink_window", 1, text_window=1, sink_tokens=4, tail_tokens=40, positions="contiguous")
    question = tuple(backbone.layout.query_ids("What colour is the shape now? " * 6))

    def made() -> list[StreamRequest]:
        turns = tuple(
            TurnInput(chunk_record(turn, (1, 1, 1)), None if turn % 3 else QueryInput(question, turn))
            for turn in range(8)
        )
        return [request(backbone, memory, turns, f"late{i}") for i in range(3)]

    settings = {"kv_slots": 2000, "max_streams": 3}
    wanted = run(OneStepEngine(backbone, **settings), made())
    for name, make in engines(backbone, **settings):
        both = 0
        found = run(make(), made())
        assert both > 10, name
        for stream, log in found.items():
            assert_same(log, wanted[stream])


def test_an_engine_on_pages_writes_the_same_logs(backbone, monkeypatch):
    """As with FlashInfer: slots anywhere in the pool, taken ahead, and given back after the forward that evicts.

    Passes of a row follow one another, so its tokens alone would not show a slot that is given out too early: that no turn
    writes where an END of its row still looks is checked row by row.
    """
    shared = 0

    def checked(plan: StepPlan, *given: Any) -> torch.Tensor:
        nonlocal shared
        seen = {int(slot) for segment in plan.ends.segments for slot in segment.slots}
        written = {int(slot) for slots in plan.turns.slots for slot in slots}
        assert not seen & written, "a slot was taken again in the row that may still see it"
        shared += len(plan.ends.slots) > 1 and bool(plan.freed)
        return forward(plan, *given)

    monkeypatch.setattr("rollout.engine.engine.forward", checked)
    use_pages(monkeypatch)
    engine = Engine(backbone, 10, 1)
    assert engine.pool.paged
    compare(backbone, [p.memory for p in POLICIES], 2 * len(POLICIES), 4, kv_slots=2500, max_streams=11)
    assert shared > 10, "rows in which several turns end and something is evicted"


def test_an_engine_that_replays_recorded_steps_writes_the_same_logs(backbone, monkeypatch):
    """As with CUDA graphs: batches padded with nobody, seats that idle until the visit, and no Python in a step."""
    replay_on_pages(monkeypatch)
    compare(backbone, [p.memory for p in POLICIES], len(POLICIES), 6, kv_slots=20000, max_streams=7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
def test_many_random_schedules(backbone, seed):
    memories = [POLICIES[seed % len(POLICIES)].memory, POLICIES[(seed * 5 + 1) % len(POLICIES)].memory]
    compare(backbone, memories, 12, seed, kv_slots=20000, max_streams=5)


LIVE = (
    MemoryConfig("rcsm", 3, text_window=4),
    MemoryConfig("sink_window", 3, text_window=4, sink_tokens=6, tail_tokens=8, positions="contiguous"),
)


def live_logs(engine: Engine | OneStepEngine, backbone, memory: MemoryConfig, seed: int) -> dict[str, StreamLog]:
    """Two live streams whose turns come one by one, the second a few turns behind, beside one that knows its turns."""
    rng = np.random.default_rng(seed)
    known = one_request(backbone, rng, memory, "known")
    engine.add(known)
    feeds = []
    for i in range(2):
        turns = random_turns(backbone, rng, 6 + i)
        # A query that is never closed would pile up: a feed has announced how much there can be.
        turns = tuple(
            replace(turn, query=replace(turn.query, until_turn=n + 1)) if turn.query else turn
            for n, turn in enumerate(turns)
        )
        plain = request(backbone, memory, turns, f"live{i}")
        feed = TurnFeed(chunk_record(0, (2, 2, 2)), 400)
        engine.add(replace(plain, turns=feed, features=()))
        feeds.append((feed, list(turns), iter(plain.features)))
    logs: dict[str, StreamLog] = {}
    for visit in range(60):
        for i, (feed, turns, features) in enumerate(feeds):
            if visit >= 4 * i and visit % (2 + i) == 0 and turns:
                turn = turns.pop(0)
                feed.push(turn, next(features) if turn.chunk is not None else None)
                if not turns:
                    feed.close()
        for log in engine.step():
            logs[log.header.stream_id] = log
    while engine.busy:
        for log in engine.step():
            logs[log.header.stream_id] = log
    assert engine.take_failed() == []
    return logs


@pytest.mark.parametrize("memory", LIVE, ids=["native", "contiguous"])
def test_live_streams_write_the_same_logs(backbone, memory):
    settings = {"kv_slots": 8000, "max_streams": 8}
    wanted = live_logs(OneStepEngine(backbone, **settings), backbone, memory, 4)
    assert wanted.keys() == {"known", "live0", "live1"}
    assert {name: log.num_turns for name, log in wanted.items() if name != "known"} == {"live0": 6, "live1": 7}
    for name, make in engines(backbone, **settings):
        found = live_logs(make(), backbone, memory, 4)
        assert found.keys() == wanted.keys(), name
        for stream, log in found.items():
            assert_same(log, wanted[stream])


def test_a_difference_in_any_column_is_seen(backbone):
    """The comparison itself: one changed number of each column fails it."""
    memory = POLICIES[6].memory
    assert memory.positions == "contiguous"
    log = max(run(OneStepEngine(backbone, 8000, 4), random_streams(backbone, [memory], 3, 3)).values(), key=len)
    assert_same(log, log)
    for column in fields(StreamLog):
        value = getattr(log, column.name)
        if not isinstance(value, np.ndarray):
            continue
        at = int(np.flatnonzero(log.sampled)[-1])
        changed = value.copy()
        changed[..., at] = ~changed[..., at] if value.dtype == bool else changed[..., at] + 1
        with pytest.raises(AssertionError):
            assert_same(replace(log, **{column.name: changed}), log)
    with pytest.raises(AssertionError):
        assert_same(replace(log, regions=None), log)

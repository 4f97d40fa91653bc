"""Two lanes: engine = learner, and each mistake that one can make with lanes is caught a thousandfold.

The defects that any policy can have are planted by benchmarks.consistency, which has a row for text_memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rollout.engine import step_plan
from streams.log.record import NEVER, Kind, StreamLog
from streams.memory import MemoryConfig, TextMemory
from tests.support.exactness.defects import written_again
from tests.support.lanes import brute_force_lanes
from tests.support.streams import CAUGHT, FP64_BAR, brute_force_expiry, differences, random_requests, run

TEXT_MEMORY = MemoryConfig("text_memory")
LINGERING = MemoryConfig("custom", target="tests.support.lanes:LingeringTurns", args={"turns": 2})


def start_of(log: StreamLog, turn: int) -> int:
    return int(np.flatnonzero((log.turn == turn) & (log.kind != Kind.MEMORY))[0])


@pytest.fixture(scope="module")
def made(fp64):
    requests = random_requests(fp64, TEXT_MEMORY, 6, seed=4, low=8)
    return requests, run(fp64, requests)


@pytest.fixture(scope="module")
def lingering(fp64):
    requests = random_requests(fp64, LINGERING, 6, seed=4, low=8)
    return requests, run(fp64, requests)


def without_lanes(stream, begin: int, end: int) -> np.ndarray:
    return stream.slots.held[stream.writer.live < end]


def rescored(backbone, made, **columns) -> float:
    """Largest mismatch with columns of the logs replaced: name -> function of (log, request)."""
    requests, logs = made
    wrong = [
        dataclasses.replace(log, **{name: of(log, r).astype(getattr(log, name).dtype) for name, of in columns.items()})
        for log, r in zip(logs, requests, strict=True)
    ]
    return float(differences(backbone, wrong, requests).max())


def test_engine_equals_one_masked_forward(fp64, made):
    requests, logs = made
    assert differences(fp64, logs, requests).max() <= FP64_BAR
    turns = [log.turn[log.kind == Kind.MEMORY] for log in logs]
    assert sum(len(np.unique(t)) for t in turns) > 30, "copies"
    assert any(len(np.unique(t)) < log.num_turns - 1 for t, log in zip(turns, logs, strict=True)), "and turns without"
    assert sum((log.kind == Kind.QUERY).any() for log in logs) >= 3
    shown = sum(int((log.kind == Kind.VIDEO).sum()) for log in logs)
    left = sum(int(((log.kind == Kind.VIDEO) & (log.expiry < len(log))).sum()) for log in logs)
    assert left > 0.8 * shown


def test_a_policy_of_ones_own_may_let_lane_one_stay(fp64, lingering):
    requests, logs = lingering
    assert differences(fp64, logs, requests).max() <= FP64_BAR
    for log in logs:
        assert (log.lane == brute_force_lanes(log, TEXT_MEMORY)).all()
        for lane in (0, 1):
            assert log.positions[0, np.flatnonzero(log.lane == lane)[0]] == 0


class TestPlantedDefects:
    """In the learner, or in the engine where it says so."""

    def test_the_null_finds_nothing(self, fp64, made):
        definition = {
            "expiry": lambda log, r: brute_force_expiry(log, r.turns, TEXT_MEMORY, fp64.layout),
            "lane": lambda log, r: brute_force_lanes(log, TEXT_MEMORY),
        }
        assert rescored(fp64, made, **definition) <= FP64_BAR

    def test_a_copy_that_sees_the_clip_is_caught(self, fp64, made):
        def after_the_copy(log, r):
            starts = np.asarray([*(start_of(log, t) for t in range(1, log.num_turns)), NEVER])
            return np.where(log.lane == 1, starts[log.turn], log.expiry)

        assert rescored(fp64, made, expiry=after_the_copy) <= FP64_BAR, "the lane alone keeps it from the clip"
        assert rescored(fp64, made, expiry=after_the_copy, lane=lambda log, r: np.zeros(len(log))) > CAUGHT

    def test_a_learner_without_lanes_is_caught_where_lane_one_stays(self, fp64, made, lingering):
        none = {"lane": lambda log, r: np.zeros(len(log))}
        assert rescored(fp64, lingering, **none) > CAUGHT
        assert rescored(fp64, made, **none) <= FP64_BAR, "under text_memory expiry alone says it"

    def test_an_engine_without_lanes_is_caught_where_lane_one_stays(self, fp64, lingering, monkeypatch):
        requests, _ = lingering
        monkeypatch.setattr(step_plan, "_seen", without_lanes)
        assert differences(fp64, run(fp64, requests), requests).max() > CAUGHT

    def test_an_engine_that_forwards_all_lanes_as_one_segment_is_caught(self, fp64, lingering, monkeypatch):
        requests, _ = lingering
        monkeypatch.setattr(step_plan, "pairwise", lambda cuts: [(cuts[0], cuts[-1])])
        monkeypatch.setattr(step_plan, "_seen", without_lanes)
        assert differences(fp64, run(fp64, requests), requests).max() > CAUGHT

    @pytest.mark.parametrize("begins", [lambda lane0, lane1: lane1, lambda lane0, lane1: 0], ids=["goes on", "at 0"])
    def test_a_wrong_restart_of_positions_is_caught(self, fp64, made, begins, monkeypatch):
        monkeypatch.setattr(TextMemory, "lane_one_begins", lambda self, lane0, lane1: begins(lane0, lane1))
        again = {"positions": lambda log, r: written_again(fp64, log, r, TEXT_MEMORY).positions}
        assert rescored(fp64, made, **again) > CAUGHT

"""Two lanes: engine = learner, and each mistake that one can make with lanes is caught a thousandfold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rollout import engine
from streams.log import GENERATED, NEVER, Kind, StreamLog
from streams.memory import MemoryConfig
from streams.writer import StreamWriter
from tests import test_exactness as exactness
from tests.lanes_lib import brute_force_lanes
from tests.streams_lib import brute_force_expiry, run

FP64_BAR, CAUGHT = exactness.FP64_BAR, exactness.TestPlantedDefects.CAUGHT
fp64, fp32 = exactness.fp64, exactness.fp32

TEXT_MEMORY = MemoryConfig("text_memory")
LINGERING = MemoryConfig("custom", target="tests.lanes_lib:LingeringTurns", args={"turns": 2})


def start_of(log: StreamLog, turn: int) -> int:
    return int(np.flatnonzero((log.turn == turn) & (log.kind != Kind.MEMORY))[0])


@pytest.fixture(scope="module")
def made(fp64):
    requests = exactness.streams(fp64, TEXT_MEMORY, 6, seed=4, low=8)
    return requests, run(fp64, requests)


@pytest.fixture(scope="module")
def lingering(fp64):
    requests = exactness.streams(fp64, LINGERING, 6, seed=4, low=8)
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
    return float(exactness.differences(backbone, wrong, requests).max())


def test_engine_equals_one_masked_forward(fp64, made):
    requests, logs = made
    assert exactness.differences(fp64, logs, requests).max() <= FP64_BAR
    turns = [log.turn[log.kind == Kind.MEMORY] for log in logs]
    assert sum(len(np.unique(t)) for t in turns) > 30, "copies"
    assert any(len(np.unique(t)) < log.num_turns - 1 for t, log in zip(turns, logs, strict=True)), "and turns without"
    assert sum((log.kind == Kind.QUERY).any() for log in logs) >= 3
    shown = sum(int((log.kind == Kind.VIDEO).sum()) for log in logs)
    left = sum(int(((log.kind == Kind.VIDEO) & (log.expiry < len(log))).sum()) for log in logs)
    assert left > 0.8 * shown


def test_fp32_is_within_rounding(fp32):
    requests = exactness.streams(fp32, TEXT_MEMORY, 16, seed=2)
    diff = exactness.differences(fp32, run(fp32, requests), requests)
    assert diff.max() <= 3e-4
    assert diff.mean() <= 1e-5


def test_a_policy_of_ones_own_may_let_lane_one_stay(fp64, lingering):
    requests, logs = lingering
    assert exactness.differences(fp64, logs, requests).max() <= FP64_BAR
    for log in logs:
        assert (log.lane == brute_force_lanes(log, TEXT_MEMORY)).all()
        for lane in (0, 1):
            assert log.positions[0, np.flatnonzero(log.lane == lane)[0]] == 0


@pytest.mark.parametrize("memory", [TEXT_MEMORY, LINGERING], ids=["text_memory", "lingering"])
def test_streams_do_not_depend_on_what_else_runs(fp64, memory):
    requests = exactness.streams(fp64, memory, 4, seed=7)
    requests += exactness.streams(fp64, MemoryConfig("rcsm", 2), 2, seed=7)
    together = run(fp64, requests)
    for alone, among in zip((run(fp64, [r])[0] for r in requests), together, strict=True):
        assert (alone.ids == among.ids).all()
        assert (alone.expiry == among.expiry).all()
        np.testing.assert_allclose(alone.behaviour_logp, among.behaviour_logp, atol=FP64_BAR)


class TestPlantedDefects:
    """In the learner, or in the engine where it says so.

    A late END changes nothing here: nobody looks at lane 1 once its turn is over.
    """

    def test_the_null_finds_nothing(self, fp64, made):
        definition = {
            "expiry": lambda log, r: brute_force_expiry(log, r.turns, TEXT_MEMORY, fp64.layout),
            "lane": lambda log, r: brute_force_lanes(log, TEXT_MEMORY),
        }
        assert rescored(fp64, made, **definition) <= FP64_BAR

    def test_a_plain_causal_mask_is_caught(self, fp64, made):
        whole = {"expiry": lambda log, r: np.full(len(log), NEVER), "lane": lambda log, r: np.zeros(len(log))}
        assert rescored(fp64, made, **whole) > CAUGHT
        assert rescored(fp64, made, expiry=whole["expiry"]) > CAUGHT, "lanes alone are no memory"

    def test_a_turn_that_leaves_one_turn_late_is_caught(self, fp64, made):
        def late(log, r):
            turns = [*(start_of(log, t) for t in range(2, log.num_turns)), NEVER, NEVER]
            return np.where(log.lane == 1, np.asarray(turns)[log.turn], log.expiry)

        assert rescored(fp64, made, expiry=late) > CAUGHT

    def test_a_turn_that_starts_at_its_video_is_caught(self, fp64, made):
        def late(log, r):
            expiry = log.expiry.astype(np.int64)
            for turn in range(1, log.num_turns):
                video = np.flatnonzero((log.turn == turn) & (log.kind == Kind.VIDEO))
                if len(video):
                    expiry[(log.turn == turn - 1) & (log.lane == 1)] = video[0]
            return expiry

        assert rescored(fp64, made, expiry=late) > CAUGHT

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
        monkeypatch.setattr(engine, "_seen", without_lanes)
        assert exactness.differences(fp64, run(fp64, requests), requests).max() > CAUGHT

    def test_an_engine_that_forwards_all_lanes_as_one_segment_is_caught(self, fp64, lingering, monkeypatch):
        requests, _ = lingering
        monkeypatch.setattr(engine, "pairwise", lambda cuts: [(cuts[0], cuts[-1])])
        monkeypatch.setattr(engine, "_seen", without_lanes)
        assert exactness.differences(fp64, run(fp64, requests), requests).max() > CAUGHT

    @pytest.mark.parametrize("begins", [lambda lane0, lane1: lane1, lambda lane0, lane1: 0], ids=["goes on", "at 0"])
    def test_a_wrong_restart_of_positions_is_caught(self, fp64, made, begins):
        def restarted(log, r):
            """The same turns written anew; what was generated is taken from the log."""
            policy = r.policy
            policy.lane_one_begins = begins
            writer = StreamWriter(r.header, r.layout, policy, fp64.cursor(r.patch_seconds))
            for turn in range(log.num_turns):
                writer.begin_turn(r.turns[turn], 0)
                for token in log.ids[(log.turn == turn) & np.isin(log.kind, GENERATED)]:
                    writer.append_generated(int(token), 0)
            del policy.lane_one_begins
            again = writer.finish()
            assert (again.ids == log.ids).all()
            return again.positions

        assert rescored(fp64, made, positions=restarted) > CAUGHT

    def test_a_ban_list_missing_in_the_learner_is_caught(self, fp64, made, monkeypatch):
        requests, logs = made
        monkeypatch.setattr(fp64, "_ban_index", torch.tensor([], dtype=torch.long))
        assert exactness.differences(fp64, logs, requests).max() > CAUGHT

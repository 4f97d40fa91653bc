"""Live streams and logs in pieces through a real engine: the same tokens, exact when joined, one stream's trouble its own."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rollout.engine.engine import Engine
from rollout.engine.feed import TurnFeed
from rollout.engine.request import StreamRequest
from streams.log.pieces import PieceFolder, join_pieces, read_pieces
from streams.memory import MemoryConfig
from streams.scoring.logprobs import behaviour_differences
from streams.writing.writer import QueryInput, TurnInput
from tests.support.logs import assert_same_log, file_size_limit
from tests.support.pages import use_pages
from tests.support.streams import (
    MODEL_TYPES,
    chunk_record,
    joined_features,
    loud_backbone,
    norms_in_input_dtype,
    random_turns,
    request,
    run,
)

LARGEST = chunk_record(0, (2, 2, 2))
BOUNDED = MemoryConfig("rcsm", 3, text_window=4)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def fp64(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("feed"), torch.float64, request.param)


def streams(backbone, count: int, turns: int = 14) -> list[StreamRequest]:
    rng = np.random.default_rng(3)
    return [request(backbone, BOUNDED, random_turns(backbone, rng, turns), f"s{i}") for i in range(count)]


def live(wanted: StreamRequest, query_tokens: int = 400) -> tuple[StreamRequest, list[tuple]]:
    """The same stream as a feed, and what is to be pushed into it."""
    features = iter(wanted.features)
    pushes = [(turn, None if turn.chunk is None else next(features)) for turn in wanted.turns]
    return dataclasses.replace(wanted, turns=TurnFeed(LARGEST, query_tokens), features=()), pushes


def run_dry(engine: Engine) -> list:
    logs = []
    while engine.busy:
        logs += engine.step()
    return logs


def test_in_pieces_an_engine_does_the_same_token_for_token_and_scores_exactly(fp64, tmp_path):
    wanted = streams(fp64, 3)
    whole = run(fp64, wanted)
    engine = Engine(fp64, kv_slots=20000, max_streams=8)
    for i, r in enumerate(wanted):
        engine.add(dataclasses.replace(r, pieces=PieceFolder(tmp_path / str(i)), piece_tokens=(1, 40, 100)[i]))
    assert run_dry(engine) == []
    assert engine.pool.available == engine.pool.capacity
    joined = [join_pieces(read_pieces(tmp_path / str(i))) for i in range(3)]
    for got, log in zip(joined, whole, strict=True):
        np.testing.assert_allclose(got.behaviour_logp, log.behaviour_logp, rtol=0, atol=1e-10)
        assert_same_log(dataclasses.replace(got, behaviour_logp=log.behaviour_logp), log)
        assert log.evicted_tokens > 0
    diff = behaviour_differences(fp64, joined, [joined_features(r) for r in wanted])
    assert np.abs(np.concatenate(diff)).max() <= 1e-10


def test_a_live_stream_that_waits_for_its_turns_writes_what_a_known_one_does(fp64):
    """Its turns come one by one, some late, beside a stream that is known from the start."""
    known, wanted = streams(fp64, 2)
    alone = run(fp64, [known, wanted])
    fed, pushes = live(wanted)
    engine = Engine(fp64, kv_slots=20000, max_streams=8)
    engine.add(known)
    engine.add(fed)
    logs = []
    for i, (turn, features) in enumerate(pushes):
        fed.turns.push(turn, features)
        for _ in range(i % 5):
            logs += engine.step()
    logs += run_dry(engine)
    assert not engine.busy, "a live stream without a turn has nothing to do"
    assert {log.header.stream_id for log in logs} == {"s0"}
    fed.turns.close()
    assert engine.busy
    logs += run_dry(engine)
    for got, log in zip(sorted(logs, key=lambda made: made.header.stream_id), alone, strict=True):
        assert (got.ids == log.ids).all()
        assert (got.expiry == log.expiry).all()
        np.testing.assert_allclose(got.behaviour_logp, log.behaviour_logp, rtol=0, atol=1e-10)
    assert engine.pool.available == engine.pool.capacity


class Made(Sequence):
    """Features that are made when they are asked for; `alive` are those that somebody still holds."""

    def __init__(self, features: Sequence[torch.Tensor]) -> None:
        self.features, self.alive = features, weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> torch.Tensor:
        made = self.features[index].clone()
        self.alive.add(made)
        return made


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    return loud_backbone(tmp_path_factory.mktemp("fed"), torch.float32)


def test_features_made_when_asked_for_are_not_kept(fp32):
    (wanted,) = streams(fp32, 1)
    made = Made(wanted.features)
    engine = Engine(fp32, kv_slots=20000, max_streams=8)
    engine.add(dataclasses.replace(wanted, features=made))
    assert not made.alive, "the bound needs no features"
    logs = []
    while engine.busy:
        logs += engine.step()
        assert not made.alive, "a forward was the last that needed them"
    assert (logs[0].ids == run(fp32, [wanted])[0].ids).all()


def test_a_disk_that_is_full_ends_that_stream_by_name_and_no_other(fp32, tmp_path):
    wanted = streams(fp32, 2)
    engine = Engine(fp32, kv_slots=20000, max_streams=8)
    engine.add(dataclasses.replace(wanted[0], pieces=PieceFolder(tmp_path / "full"), piece_tokens=30))
    engine.add(wanted[1])
    with file_size_limit(200):
        logs = run_dry(engine)
    (failed,) = engine.take_failed()
    assert failed.stream_id == "s0"
    assert "piece 0 of its log could not be written: OSError" in failed.cause
    assert engine.take_failed() == []
    assert [log.header.stream_id for log in logs] == ["s1"]
    assert engine.pool.available == engine.pool.capacity


@pytest.mark.parametrize("paged", [False, True], ids=["blocks", "pages"])
def test_a_stream_that_ends_in_the_middle_of_a_turn_leaves_seat_and_slots_to_others(fp64, monkeypatch, paged):
    wanted = {log.header.stream_id: log for log in run(fp64, streams(fp64, 4))}
    if paged:
        use_pages(monkeypatch)
    first, *others = streams(fp64, 4)
    engine = Engine(fp64, kv_slots=4000, max_streams=1, decode_steps=1)
    writer = engine.add(first)
    for other in others:
        engine.add(other)
    engine.step()
    engine.cancel({"s0"})
    assert writer.state is not None
    assert not writer.state.over, "it ended in the middle of its first turn"
    logs = run_dry(engine)
    assert [log.header.stream_id for log in logs] == ["s1", "s2", "s3"]
    for log in logs:
        other = wanted[log.header.stream_id]
        np.testing.assert_allclose(log.behaviour_logp, other.behaviour_logp, rtol=0, atol=1e-10)
        assert_same_log(dataclasses.replace(log, behaviour_logp=other.behaviour_logp), other)
    assert engine.pool.available == engine.pool.capacity


@pytest.mark.parametrize("memory", [MemoryConfig("rcsm", 3), MemoryConfig("text_memory")], ids=["rcsm", "text_memory"])
def test_a_feed_needs_a_memory_that_bounds_text_and_video(fp32, memory):
    engine = Engine(fp32, kv_slots=20000, max_streams=8)
    fed, _ = live(request(fp32, memory, streams(fp32, 1)[0].turns, "endless"))
    with pytest.raises(ValueError, match=r"stream endless may need \d+ KV slots.*a feed has no end"):
        engine.add(fed)


def test_a_turn_larger_than_announced_is_refused_where_it_is_pushed(fp32):
    feed = TurnFeed(LARGEST, 10)
    with pytest.raises(ValueError, match=r"a chunk of 16 video tokens, 1 temporal patches: .*at most 8, 2"):
        feed.push(TurnInput(chunk_record(0, (1, 4, 4))), torch.zeros(16, fp32.feature_width))
    with pytest.raises(ValueError, match="0 features for 8 video tokens"):
        feed.push(TurnInput(LARGEST))
    feed.close()
    with pytest.raises(ValueError, match="closed"):
        feed.push(TurnInput(None))


def test_more_query_tokens_than_announced_end_that_stream_by_name_and_no_other(fp32):
    other, wanted = streams(fp32, 2, turns=8)
    fed, pushes = live(wanted, query_tokens=9)
    engine = Engine(fp32, kv_slots=20000, max_streams=8)
    engine.add(other)
    engine.add(fed)
    for (turn, features), until in zip(pushes, (None, 99, 99, 99, None, None, None, None), strict=True):
        query = None if until is None else QueryInput((65, 66, 67), until)
        fed.turns.push(TurnInput(turn.chunk, query), features)
    logs = run_dry(engine)
    (failed,) = engine.take_failed()
    assert failed.stream_id == "s1"
    assert "12 tokens of queries at once, its feed was made for query_tokens=9" in failed.cause
    assert [log.header.stream_id for log in logs] == ["s0"]
    assert engine.pool.available == engine.pool.capacity

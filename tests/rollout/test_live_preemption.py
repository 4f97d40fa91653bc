"""Live streams in a pool that runs full: they keep their bound, wait for nobody, and are never given back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.engine.engine import Engine
from rollout.engine.feed import TurnFeed
from rollout.engine.request import StreamRequest, stream_bound
from rollout.engine.slots import PagedBook
from streams.log.pieces import PieceFolder, join_pieces, read_pieces
from streams.log.record import StreamLog
from streams.memory import MemoryConfig, make_policy
from tests.support.logs import assert_same_log
from tests.support.pages import use_pages
from tests.support.streams import (
    FP64_BAR,
    MODEL_TYPES,
    chunk_record,
    loud_backbone,
    norms_in_input_dtype,
    random_turns,
    request,
    run,
)

MEMORIES = (
    MemoryConfig("rcsm", 2, text_window=3),
    MemoryConfig("sink_window", 2, text_window=3, sink_tokens=4, tail_tokens=6, positions="contiguous"),
)
ROOM = 20000
"""Slots with which nothing is given back."""


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("live"), torch.float64, request.param)


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    use_pages(monkeypatch)


class Camera:
    """A live stream and the turns that are still to come from it."""

    def __init__(self, backbone, memory: MemoryConfig, name: str, turns: int) -> None:
        shown = random_turns(backbone, np.random.default_rng(turns), turns)
        # Queries that are never closed would pile up beyond what the feed has announced.
        shown = tuple(
            replace(turn, query=replace(turn.query, until_turn=n + 1)) if turn.query else turn
            for n, turn in enumerate(shown)
        )
        plain = request(backbone, memory, shown, name)
        self.feed = TurnFeed(chunk_record(0, (2, 2, 2)), 100)
        self.request = replace(plain, turns=self.feed, features=())
        features = iter(plain.features)
        self._turns = [(turn, None if turn.chunk is None else next(features)) for turn in shown]

    def push(self) -> None:
        """Show the next turn, if there is one; the last one closes the feed."""
        if self._turns:
            self.feed.push(*self._turns.pop(0))
            if not self._turns:
                self.feed.close()


class Scene:
    """Nine streams that know their turns, two cameras among them and one stream whose log goes out in pieces."""

    def __init__(self, backbone, memory: MemoryConfig, folder) -> None:
        rng = np.random.default_rng(1)
        self.folder = folder
        # Some forget, some grow to their end.
        self.known = [
            request(backbone, (memory, MemoryConfig("full"))[i % 2], random_turns(backbone, rng, 7), f"known/{i}")
            for i in range(9)
        ]
        self.cameras = [Camera(backbone, memory, f"camera/{i}", 5 + i) for i in range(2)]
        pieces = request(backbone, memory, random_turns(backbone, rng, 6), "pieces")
        self.pieces = replace(pieces, pieces=PieceFolder(folder), piece_tokens=30)

    @property
    def requests(self) -> list[StreamRequest]:
        """In the order in which they come; the second camera comes while the others run."""
        first, second = (camera.request for camera in self.cameras)
        return [self.known[0], first, self.pieces, *self.known[1:], second]

    @property
    def smallest(self) -> int:
        """Slots for all that is kept, and for one stream beside it."""
        kept = [*(camera.request for camera in self.cameras), self.pieces]
        return sum(stream_bound(r) for r in kept) + max(stream_bound(r) for r in self.known)

    def run(self, engine: Engine) -> tuple[dict[str, StreamLog], list[str]]:
        """Returns all logs, and who was given back."""
        assert isinstance(engine.pool.book, PagedBook)
        *at_first, late = self.requests
        writers = {r.header.stream_id: engine.add(r) for r in at_first}
        logs: dict[str, StreamLog] = {}
        preempted: list[str] = []
        visit = 0
        while engine.busy or any(not camera.feed.ended for camera in self.cameras):
            if visit == 3:
                writers[late.header.stream_id] = engine.add(late)
            for i, camera in enumerate(self.cameras):
                if visit >= 3 * i and visit % (2 + i) == 0:
                    camera.push()
            running = [stream for stream in engine.admission.running if not stream.keeps]
            due = {
                stream.id: stream.writer.turn
                for stream in engine.admission.running
                if stream.keeps and stream.between_turns and stream.source.ready
            }
            for log in engine.step():
                logs[log.header.stream_id] = log
            given_back = engine.admission.take_preempted()
            assert all(name.startswith("known/") for name in given_back)
            assert not running or running[0].id not in given_back
            for name, turn in due.items():
                assert writers[name].turn == turn + 1, "a live stream waits for nobody"
            assert 0 <= engine.pool.book.kept <= engine.pool.book.available, "what is kept is free"
            preempted += given_back
            visit += 1
        assert engine.take_failed() == []
        assert engine.pool.available == engine.pool.capacity
        return logs | {"pieces": join_pieces(read_pieces(self.folder))}, preempted


@pytest.mark.parametrize(
    ("memory", "decode_steps"), list(zip(MEMORIES, (1, 8), strict=True)), ids=["native", "contiguous"]
)
def test_live_streams_among_those_that_are_given_back_write_the_same_logs(backbone, memory, decode_steps, tmp_path):
    wanted, none = Scene(backbone, memory, tmp_path / "room").run(Engine(backbone, ROOM, 16))
    assert none == []
    scene = Scene(backbone, memory, tmp_path / "small")
    found, preempted = scene.run(Engine(backbone, scene.smallest, 16, decode_steps=decode_steps))
    assert len(preempted) > 2
    assert found.keys() == wanted.keys() == {r.header.stream_id for r in scene.requests}
    for name, log in found.items():
        np.testing.assert_allclose(log.behaviour_logp, wanted[name].behaviour_logp, rtol=0, atol=FP64_BAR)
        assert_same_log(replace(log, behaviour_logp=wanted[name].behaviour_logp), wanted[name])


@pytest.mark.parametrize("live_first", [False, True])
def test_streams_that_do_not_fit_beside_what_is_kept_wait_for_its_end(backbone, live_first):
    """Each fits into the pool, both do not: the second begins when the first has ended, and neither is given back."""
    camera = Camera(backbone, MEMORIES[0], "camera", 4)
    known = request(backbone, MEMORIES[0], random_turns(backbone, np.random.default_rng(2), 6), "known")
    slots = stream_bound(camera.request) + stream_bound(known) - 1
    engine = Engine(backbone, slots, 4)
    both = [camera.request, known] if live_first else [known, camera.request]
    for r in both:
        engine.add(r)
    ended = []
    while len(ended) < 2:
        camera.push()
        assert engine.busy
        ended += [log.header.stream_id for log in engine.step()]
        running = {stream.id for stream in engine.admission.running}
        assert len(running) < 2
    assert ended == [r.header.stream_id for r in both]
    assert engine.admission.take_preempted() == []
    assert engine.pool.available == slots


def test_a_stream_whose_log_is_out_in_pieces_is_not_given_back_although_it_is_the_youngest(backbone, tmp_path):
    rng = np.random.default_rng(4)
    full = MemoryConfig("full")
    older = [request(backbone, full, random_turns(backbone, rng, 8), f"known/{i}") for i in range(2)]
    plain = request(backbone, MEMORIES[0], random_turns(backbone, rng, 8), "pieces")
    wanted = run(backbone, [plain])[0]
    youngest = replace(plain, policy=make_policy(MEMORIES[0]), pieces=PieceFolder(tmp_path), piece_tokens=20)
    engine = Engine(backbone, stream_bound(youngest) + max(stream_bound(r) for r in older), 4)
    for r in (*older, youngest):
        engine.add(r)
    engine.step()
    assert [stream.id for stream in engine.admission.running] == ["known/0", "known/1", "pieces"]
    while engine.busy:
        engine.step()
    assert set(engine.admission.take_preempted()) == {"known/1"}
    joined = join_pieces(read_pieces(tmp_path))
    np.testing.assert_array_equal(joined.ids, wanted.ids)
    np.testing.assert_allclose(joined.behaviour_logp, wanted.behaviour_logp, rtol=0, atol=FP64_BAR)


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_kept_is_shared_with_nobody(backbone, first, tmp_path):
    """Slots that others hold would not come back when it drops them."""
    turns = random_turns(backbone, np.random.default_rng(5), 4)
    known, plain = (request(backbone, MEMORIES[0], turns, name, feature_seed=0) for name in ("known", "pieces"))
    pieces = replace(plain, features=known.features, pieces=PieceFolder(tmp_path), piece_tokens=20)
    engine = Engine(backbone, ROOM, 4)
    for r in (known, pieces)[:: 1 if first == 0 else -1]:
        engine.add(r)
    while engine.busy:
        engine.step()
    assert engine.shared == 0
    assert engine.pool.available == engine.pool.book.spare == ROOM

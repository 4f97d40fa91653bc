"""Graphs of the decode step: which size serves a batch, what outlives a swap of weights, and when steps run without them.

On a CPU, with recorded calls in the place of CUDA graphs; tests/cuda/test_cuda_graphs.py has the real ones.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from rollout.decode.graphs import StepGraphs, batch_sizes
from rollout.engine.engine import Engine
from rollout.staging import StagedWeights
from streams.memory import MemoryConfig
from tests.support.gather_attention import GatherBackend
from tests.support.recorded_steps import RecordedCapture, replay_on_pages
from tests.support.streams import loud_backbone, norms_in_input_dtype, random_turns, request

MEMORY = MemoryConfig("rcsm", 3, text_window=4)


@pytest.fixture
def backbone(tmp_path):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path / "model", torch.float64)


def engine_of(backbone, **settings) -> Engine:
    return Engine(backbone, kv_slots=4000, max_streams=6, decode_steps=4, **settings)


def graphs_of(engine: Engine) -> StepGraphs:
    graphs = engine._decoder._graphs
    assert graphs is not None
    return graphs


def ids_of(engine: Engine, backbone, name: str, streams: int = 5) -> dict[str, list[int]]:
    """Run random streams to their end; the ids of each."""
    rng = np.random.default_rng(3)
    for i in range(streams):
        engine.add(request(backbone, MEMORY, random_turns(backbone, rng, 4 + i), f"{name}{i}"))
    logs = {}
    while engine.busy:
        logs |= {log.header.stream_id: log.ids.tolist() for log in engine.step()}
    assert len(logs) == streams
    return logs


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 17, 64, 100, 256])
def test_every_batch_has_a_size_that_is_little_larger(most):
    sizes = batch_sizes(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size == rows or size < (1.5 if rows > 8 else 2) * rows
    assert len(sizes) <= 2 * most.bit_length()


def test_a_batch_is_captured_once_and_replayed(backbone, monkeypatch):
    replay_on_pages(monkeypatch)
    captured, wanted = [], ids_of(engine_of(backbone, cuda_graphs="off"), backbone, "a")
    record = RecordedCapture.__call__
    monkeypatch.setattr(RecordedCapture, "__call__", lambda self, step: captured.append(0) or record(self, step))
    engine = engine_of(backbone)
    assert (engine.graphs.name, len(captured)) == ("graphs", 1), "the largest batch, as the engine is made"
    assert ids_of(engine, backbone, "a") == wanted
    first = len(captured)
    assert ids_of(engine, backbone, "a") == wanted
    assert graphs_of(engine).captured == len(captured) == first


def test_graphs_outlive_a_swap_of_weights_and_run_on_the_new_ones(backbone, monkeypatch):
    replay_on_pages(monkeypatch)
    engine = engine_of(backbone)
    before = ids_of(engine, backbone, "a")
    captured = dict(graphs_of(engine)._graphs)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: p + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in backbone.model.named_parameters()
        if "language_model" in name
    }
    StagedWeights(1, tensors).apply(backbone)
    engine.version = 1
    after = ids_of(engine, backbone, "a")
    assert after != before
    # Other tokens make other batches, some of a size that was not captured yet.
    assert captured.items() <= graphs_of(engine)._graphs.items()
    assert after == ids_of(engine_of(backbone, cuda_graphs="off"), backbone, "a")


def test_weights_that_lie_elsewhere_after_a_swap_are_captured_anew(backbone, monkeypatch, caplog):
    replay_on_pages(monkeypatch)
    engine = engine_of(backbone)
    ids_of(engine, backbone, "a")
    captured = graphs_of(engine).captured
    head = backbone.model.lm_head.weight
    head.data = head.data.flip(0).clone()
    engine.version = 1
    with caplog.at_level(logging.WARNING):
        found = ids_of(engine, backbone, "a")
    assert "weights were replaced and not copied into" in caplog.text
    assert graphs_of(engine).captured > captured
    assert found == ids_of(engine_of(backbone, cuda_graphs="off"), backbone, "a")


def test_a_wider_table_is_captured_anew(backbone, monkeypatch):
    replay_on_pages(monkeypatch)
    engine = engine_of(backbone)
    wanted = ids_of(engine, backbone, "a")
    captured, state = graphs_of(engine).captured, engine._decoder.state
    width, rows = state.table.shape[1], len(state.ids)
    state.make_room(width, rows - 1)
    assert (state.table.shape[1], len(state.ids)) == (width, rows)
    state.make_room(width + 1, 0)
    assert state.table.shape[1] >= 1.5 * width - 1
    assert ids_of(engine, backbone, "a") == wanted
    assert graphs_of(engine).captured > captured


@pytest.mark.parametrize("good", [0, 1])
def test_a_step_that_cannot_be_captured_runs_eagerly_and_a_warning_says_why(backbone, monkeypatch, caplog, good):
    """good: captures that succeed before. The first is made with the engine, the second for a wider table."""
    replay_on_pages(monkeypatch)
    wanted = ids_of(engine_of(backbone, cuda_graphs="off"), backbone, "a")
    record, tried = RecordedCapture.__call__, []

    def refused(self, step):
        tried.append(step)
        if len(tried) > good:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(self, step)

    monkeypatch.setattr(RecordedCapture, "__call__", refused)
    with caplog.at_level(logging.WARNING):
        engine = engine_of(backbone)
        assert engine.graphs.name == ("graphs" if good else "eager")
        assert ids_of(engine, backbone, "a") == wanted
    why = "a decode step of 6 rows cannot be captured: RuntimeError: operation not permitted"
    assert caplog.text.count("rollout.cuda_graphs: ") == 1
    assert why in caplog.text
    assert good or why in str(engine.graphs)
    assert len(tried) == good + 1


def test_a_step_that_reads_on_the_host_would_be_found_out(backbone, monkeypatch):
    """The recorded calls are a stand-in worth having: they keep what the host read, as a graph does."""
    replay_on_pages(monkeypatch)
    wanted = ids_of(engine_of(backbone), backbone, "a", streams=1)
    replay_on_pages(monkeypatch, GatherBackend)
    assert ids_of(engine_of(backbone, cuda_graphs="off"), backbone, "a", streams=1) == wanted
    assert ids_of(engine_of(backbone), backbone, "a", streams=1) != wanted

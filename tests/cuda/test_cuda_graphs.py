"""On a GPU: decoding with Triton, and decode steps as CUDA graphs, against the torch backend kernel by kernel."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.attention import make_backend, with_decode
from rollout.decode.state import ROW
from rollout.engine.engine import Engine
from rollout.engine.kv_pool import KVPool
from rollout.staging import StagedWeights
from streams.backbone.kernel_choice import Choice
from streams.memory import MemoryConfig
from tests.support.streams import loud_backbone, norms_in_input_dtype, random_turns, request

pytest.importorskip("triton")
pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.timeout(900)]

MEMORIES = (
    MemoryConfig("rcsm", 3, text_window=4),
    MemoryConfig("sink_window", 2, 2, sink_tokens=4, tail_tokens=8, positions="contiguous"),
)
BARS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SEATS, WIDTH = 8, 4096


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("heads", [(16, 2, 128), (32, 8, 128), (6, 2, 48)])
@pytest.mark.parametrize("dtype", BARS)
def test_triton_decodes_as_the_torch_backend_does(dtype, heads, paged):
    query, kv, dim = heads
    pools = [KVPool(SEATS * WIDTH, 1, kv, dim, dtype=dtype, device="cuda", paged=p) for p in (paged, False)]
    pools[1].kv.normal_()
    pools[0].kv.copy_(pools[1].kv.permute(0, 3, 1, 2, 4) if paged else pools[1].kv)
    table = torch.arange(SEATS * WIDTH, device="cuda").view(SEATS, WIDTH)
    seats = torch.tensor([5, 0, 7, 2], device="cuda")
    lengths = torch.tensor([WIDTH, 1, 129, 1000], device="cuda")
    torch_backend = make_backend("torch", pools[1], query // kv)
    named = Choice("triton", "rollout.attention=triton")
    # On pages nothing but decoding is asked of it.
    backend, _ = with_decode(named, Choice("torch", ""), torch_backend, pools[0], query // kv)
    q = torch.randn(query, 4, dim, device="cuda", dtype=dtype)
    found, wanted = (b.decode(table, seats, lengths)(0, q, dim**-0.5) for b in (backend, torch_backend))
    torch.testing.assert_close(found, wanted, atol=BARS[dtype], rtol=BARS[dtype])


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def backbone(request, tmp_path):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path / "model", torch.float64, request.param, device="cuda")


def engine_of(backbone, attention="triton", cuda_graphs="auto") -> Engine:
    return Engine(backbone, 8000, 6, attention, 4, cuda_graphs)


def logs_of(engine, backbone):
    """Native and contiguous, sampled and greedy streams, which join one by one."""
    rng = np.random.default_rng(3)
    waiting = [
        request(backbone, MEMORIES[i % 2], random_turns(backbone, rng, 3 + i), f"s{i}", temperature=float(i % 3 > 0))
        for i in range(8)
    ]
    waiting = [replace(r, features=tuple(f.to(backbone.device) for f in r.features)) for r in waiting]
    logs = {}
    while waiting or engine.busy:
        if waiting:
            engine.add(waiting.pop(0))
        logs |= {log.header.stream_id: log for log in engine.step()}
    return logs


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, log in found.items():
        np.testing.assert_array_equal(log.ids, wanted[name].ids)
        np.testing.assert_allclose(log.behaviour_logp, wanted[name].behaviour_logp, rtol=0, atol=1e-10)


def test_replayed_streams_are_those_of_eager_steps_and_of_torch(backbone):
    replayed = engine_of(backbone)
    assert str(replayed.decode_attention) == "triton (rollout.attention=triton)"
    assert str(replayed.graphs) == "graphs (auto)"
    wanted = logs_of(engine_of(backbone, "torch"), backbone)
    assert sum(int(log.sampled.sum()) for log in wanted.values()) > 200
    eager = engine_of(backbone, cuda_graphs="off")
    assert eager.graphs.name == "eager"
    assert_same(logs_of(eager, backbone), wanted)
    assert_same(logs_of(replayed, backbone), wanted)


def test_a_replayed_step_is_the_eager_step(backbone):
    """The same kernels on the same rows: equal bit for bit, as the batch fills its size."""
    engines = [engine_of(backbone), engine_of(backbone, cuda_graphs="off")]
    for engine in engines:
        rng = np.random.default_rng(4)
        for stream in range(6):
            made = request(backbone, MEMORIES[0], random_turns(backbone, rng, 3), f"s{stream}")
            engine.add(replace(made, features=tuple(f.to(backbone.device) for f in made.features)))
        engine.step()
    replayed, eager = (engine._decoder.state for engine in engines)
    assert int(replayed.ints[ROW.written].max()) >= 4
    assert torch.equal(replayed.ints, eager.ints)
    # Behind the last token of a seat lies whatever the batch computed for it.
    assert torch.equal(replayed.ids[:5, :6], eager.ids[:5, :6])
    assert torch.equal(replayed.logps[:5, :6].nan_to_num(1.0), eager.logps[:5, :6].nan_to_num(1.0))


def test_graphs_outlive_a_swap_of_weights(backbone):
    engine = engine_of(backbone)
    before = logs_of(engine, backbone)
    captured = dict(engine._decoder._graphs._graphs)
    assert captured
    text = [(name, p) for name, p in backbone.model.named_parameters() if "language_model" in name]
    StagedWeights(1, {name: p + 0.05 * torch.randn_like(p) for name, p in text}).apply(backbone)
    engine.version = 1
    after = logs_of(engine, backbone)
    assert any(after[name].ids.tolist() != log.ids.tolist() for name, log in before.items())
    assert captured.items() <= engine._decoder._graphs._graphs.items()
    eager = engine_of(backbone, cuda_graphs="off")
    eager.version = 1
    assert_same(after, logs_of(eager, backbone))


def test_steps_are_captured_while_another_thread_uses_the_device(backbone):
    wanted = logs_of(engine_of(backbone, cuda_graphs="off"), backbone)
    stop, failed = threading.Event(), []

    def stage():
        try:
            while not stop.is_set():
                # Of other sizes each time, so that the allocator asks the device for memory.
                rows = torch.randn(int(np.random.randint(100, 4000)), 1024).to("cuda")
                float((rows @ rows.T).sum())
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=stage, daemon=True)
    thread.start()
    engine = engine_of(backbone)
    found = logs_of(engine, backbone)
    stop.set()
    thread.join(30)
    assert not failed
    assert engine.graphs.name == "graphs"
    assert engine._decoder._graphs.failure == ""
    assert_same(found, wanted)


def test_a_step_that_reads_on_the_host_is_not_captured_and_runs_eagerly(backbone, monkeypatch, caplog):
    wanted = logs_of(engine_of(backbone, cuda_graphs="off"), backbone)
    logits = type(backbone).logits

    def reading(self, hidden, temperature):
        found = logits(self, hidden, temperature)
        assert float(found[0].max()) > -np.inf
        return found

    monkeypatch.setattr(type(backbone), "logits", reading)
    engine = engine_of(backbone)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert engine.graphs.name == "eager"
    assert "a decode step of 6 rows cannot be captured" in engine.graphs.why
    assert caplog.text.count("rollout.cuda_graphs: ") == 1
    assert_same(logs_of(engine, backbone), wanted)

"""On a GPU: engine equals learner in every dtype and backend, recomputed activations, a learner step, a weight swap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.long_streams.activation_checkpointing import checkpoint_activations
from learner.setup import LearnerSetup
from rollout.engine.engine import Engine
from rollout.staging import StagedWeights
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.kernel_choice import has_module
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec
from streams.layout.layout import LayoutConfig
from streams.log.mismatch import LogpDiff
from streams.log.record import NEVER
from streams.memory import MemoryConfig
from streams.messages import GroupPayload
from streams.scoring.logprobs import behaviour_differences, score_rows
from streams.scoring.packing import pack
from tests.support.learner import GRPO, even
from tests.support.streams import joined_features, random_turns, request

pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.timeout(900)]

# Two layers with the heads of a 3B model: FlashInfer takes heads of 64, 128 and 256.
WIDE = {"hidden": 2048, "layers": 2, "heads": 16, "kv_heads": 2, "mlp": 1024}
SPECS = {
    "qwen2_5_vl": TinySpec(**WIDE),
    "qwen3_vl": replace(QWEN3_SPEC, **WIDE | {"layers": 4}, head_dim=128),
}
LAYOUT = LayoutConfig(think_budget=5, max_new_tokens=10)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BARS = {"float32": 1e-4, "bfloat16": 1e-2}


@pytest.fixture(scope="module", params=SPECS)
def checkpoint(request, tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("wide") / request.param, SPECS[request.param], seed=5)


def load(checkpoint, dtype):
    return Backbone.load(checkpoint, LAYOUT, dtype=DTYPES[dtype], device="cuda")


MEMORIES = {
    "rcsm": MemoryConfig("rcsm", 2),
    "contiguous": MemoryConfig("sink_window", 2, 2, sink_tokens=4, tail_tokens=8, positions="contiguous"),
    "text_memory": MemoryConfig("text_memory"),
}


def sampled(backbone, attention, count=6, memory=MEMORIES["rcsm"]):
    """(requests, logs) of streams that evict."""
    rng = np.random.default_rng(0)
    made = [request(backbone, memory, random_turns(backbone, rng, 8), f"s{i}") for i in range(count)]
    made = [replace(r, features=tuple(f.to(backbone.device) for f in r.features)) for r in made]
    engine = Engine(backbone, 20000, 16, attention)
    for r in made:
        engine.add(r)
    done = {}
    while engine.busy:
        done |= {log.header.stream_id: log for log in engine.step()}
    return made, [done[r.header.stream_id] for r in made]


BACKENDS = [
    ("float32", "torch"),
    ("bfloat16", "torch"),
    pytest.param(
        "bfloat16",
        "flashinfer",
        marks=pytest.mark.skipif(not has_module("flashinfer"), reason="flashinfer-python is not installed"),
    ),
]


@pytest.mark.parametrize(("dtype", "attention"), BACKENDS)
@pytest.mark.parametrize("learner", ["sdpa", "flex"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_engine_equals_learner(checkpoint, dtype, attention, learner, memory):
    backbone = load(checkpoint, dtype)
    requests, logs = sampled(backbone, attention, memory=MEMORIES[memory])
    assert all((log.expiry < len(log)).any() for log in logs)
    features = [joined_features(r) for r in requests]
    found = LogpDiff.of(np.concatenate(behaviour_differences(backbone, logs, features, attention=learner)))
    assert found.tokens > 200
    assert found.mean <= BARS[dtype]
    # And the comparison can fail: without eviction everything is far away (on a CPU by 0.11 a token in either dtype).
    kept = [replace(log, expiry=np.full_like(log.expiry, NEVER)) for log in logs]
    wrong = LogpDiff.of(np.concatenate(behaviour_differences(backbone, kept, features, attention=learner)))
    assert wrong.mean > 3 * BARS["bfloat16"]


@pytest.mark.skipif(not has_module("flashinfer"), reason="flashinfer-python is not installed")
def test_both_backends_agree_on_teacher_forced_tokens(checkpoint):
    """What one backend sampled, scored once, lies within rounding of what either of them logged."""
    backbone = load(checkpoint, "bfloat16")
    means = {}
    for attention in ("torch", "flashinfer"):
        requests, logs = sampled(backbone, attention)
        features = [joined_features(r) for r in requests]
        means[attention] = LogpDiff.of(np.concatenate(behaviour_differences(backbone, logs, features))).mean
    assert all(mean <= 1e-2 for mean in means.values()), means


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_activations_give_the_same_gradients_in_less_memory(checkpoint, dtype):
    backbone = load(checkpoint, dtype)
    requests, logs = sampled(backbone, "auto")
    backbone.freeze("tower+merger")
    rows = pack(logs, [list(range(len(logs)))])
    features = torch.cat([joined_features(r) for r in requests])

    def step():
        backbone.model.zero_grad()
        backbone.model.train()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = score_rows(backbone, rows, features, attention="flex").logp.mean()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        gradients = {name: p.grad.float() for name, p in backbone.trainable().items() if p.grad is not None}
        return float(loss.detach()), gradients, held

    loss, gradients, held = step()
    assert checkpoint_activations(backbone) == backbone.num_layers
    again, recomputed, less = step()
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert abs(again - loss) <= tolerance * abs(loss)
    assert recomputed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Sums over keys are added up in another order from call to call.
        assert float((recomputed[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-8, name
    assert less < held


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_learner_step_and_the_swap_of_its_weights(checkpoint, ranks, offload):
    worker = load(checkpoint, "bfloat16")
    requests, logs = sampled(worker, "auto", count=2)
    payload = GroupPayload((logs[0],), "features", to_array(joined_features(requests[0])[None]))
    config = LearnerConfig(
        lr=1e-3, dtype="bfloat16", freeze="tower+merger", offload=offload, activation_checkpointing=True
    )
    learner = LearnerEngine(LearnerSetup(str(checkpoint), LAYOUT, config, total_steps=3, seed=0), ranks)
    before = {name: p.detach().clone() for name, p in worker.model.named_parameters()}
    reports = [learner.train(step, GRPO, [even(payload, (1.0,))]) for step in range(3)]
    assert [report.metrics["compiles"] for report in reports[1:]] == [reports[1].metrics["compiles"]] * 2
    staged = StagedWeights.stage(learner.export_weights(), worker)
    assert all(tensor.is_cuda for tensor in staged.tensors.values())
    staged.apply(worker)
    trained = dict(learner.backbone.model.named_parameters())
    for name, parameter in worker.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert name not in staged.tensors or parameter.dtype == torch.bfloat16
    moved = [name for name, p in worker.model.named_parameters() if not torch.equal(p, before[name])]
    assert moved
    assert not any(".visual." in name for name in moved)
    learner.close()

"""Fused norms, rotation and gated units: what they compute, in Triton's interpreter, and what happens where they cannot run."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streams.backbone.backbone import Backbone
from streams.backbone.fused import modules as fused
from streams.backbone.kernel_choice import Choice
from streams.backbone.tiny import build_tiny
from streams.layout.layout import LayoutConfig
from tests.support.causal import Causal
from tests.support.exactness.backbones import SPECS
from tests.support.printed import lines

pytest.importorskip("triton")

BARS = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3}
"""Largest difference from the modules of transformers, relative to the largest value."""


class Counted(TorchDispatchMode):
    """Counts calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func.name()).split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def cases():
    return [json.loads(line) for line in lines("tests.support.fused_cases", TRITON_INTERPRET="1")]


def test_each_kernel_and_its_gradients_are_those_of_the_modules(cases):
    operations = [case for case in cases if "dtype" in case]
    assert len(operations) == 15
    for case in operations:
        assert case["shapes"], case
        assert max(case["forward"], case["backward"]) <= BARS[case["dtype"]], case
        assert case["repeats"], case
        assert case["inputs_kept"], case
        assert case["one_row_alone"], case
        # Rounded where the modules round: half precision shows a sum in another order at most, and a rotation nothing.
        assert case["equal"] or case["case"] != "rotation", case
        assert case["forward"] <= 1e-4 or case["dtype"] != "float16", case


def test_a_text_model_and_its_gradients_are_the_same_with_them(cases):
    models = [case for case in cases if "parameters" in case]
    assert [(case["case"], case["norms_of_heads"]) for case in models] == [("qwen2_5_vl", 0), ("qwen3_vl", 2)]
    for case in models:
        assert case["names"], case
        assert case["parameters"] > 20, case
        assert max(case["forward"], case["backward"]) <= 1e-13, case
        assert case["checkpointed"], case
        assert case["others_kept"], case


def test_the_benchmark_times_both_ways_and_compares_what_they_compute(cases):
    (row,) = [case for case in cases if case["case"] == "benchmark"]
    assert row["relative_difference"] < 1e-6
    assert {f"{n}_{which}_ms" for n in ("off", "triton") for which in ("forward", "both_ways")} < row.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", SPECS)
def test_in_place_a_text_model_computes_bit_for_bit_what_it_did(tmp_path, model_type, dtype):
    path = build_tiny(tmp_path / "tiny", SPECS[model_type], seed=3, gain=2.0, std=1.0)
    plain, fused = (Backbone.load(path, LayoutConfig(), dtype=dtype, fused_kernels=name) for name in ("off", "torch"))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(plain.tokenizer), (2, 19), generator=generator)
    positions = torch.randint(50, (3, 2, 19), generator=generator)
    with torch.no_grad(), Counted() as before:
        wanted = plain.hidden(ids, positions, Causal())
    with torch.no_grad(), Counted() as now:
        assert fused.hidden(ids, positions, Causal()).equal(wanted)
    assert now.calls["aten::cat"] < before.calls["aten::cat"], "they were not in use"
    # With gradient the modules run as they are.
    found, expected = (backbone.hidden(ids, positions, Causal()) for backbone in (fused, plain))
    assert found.equal(expected)
    found.float().sin().sum().backward()
    expected.float().sin().sum().backward()
    wanted_grads = dict(plain.model.named_parameters())
    for name, p in fused.model.named_parameters():
        assert p.grad is None or p.grad.equal(wanted_grads[name].grad), name


def test_wide_outputs_are_written_where_the_last_ones_were_and_by_each_thread_elsewhere(tmp_path, monkeypatch):
    path = build_tiny(tmp_path / "tiny", seed=3, gain=2.0, std=1.0)
    plain, fused_one = (Backbone.load(path, LayoutConfig(), fused_kernels=name) for name in ("off", "torch"))
    ids, positions = torch.arange(12)[None], torch.arange(12).expand(3, 1, -1)
    mlp = fused_one.model.model.language_model.layers[1].mlp
    x = torch.randn(5, mlp.gate_proj.in_features)
    with torch.no_grad():
        wanted = plain.hidden(ids, positions, Causal())
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        assert gate.equal(torch.nn.functional.linear(x, mlp.gate_proj.weight))
        assert mlp.gate_proj(x[:2]).data_ptr() == gate.data_ptr() != up.data_ptr()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.no_grad()(mlp.gate_proj), x).result().data_ptr() != gate.data_ptr()
        # An output of a unit is never one that is kept: it outlives the next layer's.
        assert fused_one.hidden(ids, positions, Causal()).equal(wanted)
        monkeypatch.setattr(fused, "MOST_KEPT", 0)
        fresh = mlp.gate_proj(x)
        assert gate.data_ptr() != fresh.data_ptr() != mlp.gate_proj(x[:2]).data_ptr()
        assert fused_one.hidden(ids, positions, Causal()).equal(wanted)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter needs no compiler")
def test_kernels_that_cannot_be_compiled_give_way_or_are_refused(monkeypatch, caplog):
    """Triton compiles for no CPU: a real failure, as of a driver or a compiler that is missing."""
    chosen = {"auto": Choice("triton", "auto"), "triton": Choice("triton", "model.fused_kernels=triton")}
    monkeypatch.setattr(fused, "choose_fused_kernels", lambda asked, *_: chosen[asked])
    why = "Triton's kernels cannot be compiled in torch.bfloat16: "
    with caplog.at_level(logging.WARNING):
        choice = fused.settle_fused_kernels("auto", "cpu", "bfloat16")
    assert choice.name == "torch"
    assert choice.why.startswith(why)
    assert f"model.fused_kernels: torch instead of triton: {why}" in caplog.text
    said = r"model.fused_kernels=triton cannot run here: .*; use model.fused_kernels=torch"
    with pytest.raises(ValueError, match=said):
        fused.settle_fused_kernels("triton", "cpu", "bfloat16")


def test_weights_are_copied_into_the_same_parameters_and_exports_load_without_them(tmp_path):
    backbone = Backbone.load(build_tiny(tmp_path / "tiny"), LayoutConfig(), fused_kernels="triton")
    plain = Backbone.load(tmp_path / "tiny", LayoutConfig())
    assert list(backbone.model.state_dict()) == list(plain.model.state_dict())
    assert (backbone.fused_kernels, plain.fused_kernels) == ("triton", "off")
    norm = backbone.model.model.language_model.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight.fill_(3.0)
    backbone.save(tmp_path / "export", {})
    exported = Backbone.load(tmp_path / "export", LayoutConfig())
    assert exported.model.model.language_model.layers[0].input_layernorm.weight.unique().tolist() == [3.0]


def test_units_gated_by_another_activation_stay_as_they_are(tmp_path):
    path = build_tiny(tmp_path / "tiny", seed=3, gain=2.0, std=1.0)
    settings = json.loads((path / "config.json").read_text())
    settings["text_config"]["hidden_act"] = "gelu"
    (path / "config.json").write_text(json.dumps(settings))
    plain, fused_one = (Backbone.load(path, LayoutConfig(), fused_kernels=name) for name in ("off", "torch"))
    ids, positions = torch.arange(12)[None], torch.arange(12).expand(3, 1, -1)
    with torch.no_grad():
        assert fused_one.hidden(ids, positions, Causal()).equal(plain.hidden(ids, positions, Causal()))
    assert "GELU" in type(plain.model.model.language_model.layers[0].mlp.act_fn).__name__

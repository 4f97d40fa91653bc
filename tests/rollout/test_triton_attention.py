"""The Triton decode kernel: what it computes, in Triton's interpreter, and that it compiles for a GPU that is not here."""

from __future__ import annotations

import json
import logging
import os

import pytest

from rollout.attention import make_backend, with_decode
from rollout.engine.kv_pool import KVPool
from streams.backbone.kernel_choice import Choice
from tests.support.printed import lines

pytest.importorskip("triton")

BARS = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.mark.slow
def test_every_row_gets_the_softmax_over_its_own_slots_whatever_the_batch():
    cases = [json.loads(line) for line in lines("tests.support.triton_cases", TRITON_INTERPRET="1")]
    assert len(cases) == 14
    for case in cases:
        assert case["error"] <= BARS[case["dtype"]], case
        assert case["error_with_a_key_less"] > 2 * BARS[case["dtype"]], case
        assert case["alone_is_equal"], case
        assert case["out_dtype"], case


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_and_fit_its_shared_memory(tmp_path):
    assert len(lines("tests.support.triton_compile", TRITON_CACHE_DIR=str(tmp_path))) == 7 + 4


@pytest.mark.slow
def test_an_engine_that_decodes_with_triton_writes_what_torch_writes():
    cases = [json.loads(line) for line in lines("tests.support.triton_engine", TRITON_INTERPRET="1")]
    assert [(c["paged"], c["decode"], c["steps"]) for c in cases] == [
        (False, "triton", "eager"),
        (True, "triton", "graphs"),
    ]
    for case in cases:
        assert case["same_ids"], case
        assert case["logp_difference"] <= 1e-12, case
        assert case["sampled"] > 40, case
        assert case["evicted"] > 40, case


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter needs no compiler")
def test_a_kernel_that_cannot_be_compiled_gives_way_or_is_refused(caplog):
    """Triton compiles for no CPU: a real failure, as of a driver or a compiler that is missing."""
    pool = KVPool(8, 1, 2, 16)
    torch_backend, prefill = make_backend("torch", pool, 2), Choice("torch", "no CUDA")
    given = (prefill, torch_backend, pool, 2)
    with caplog.at_level(logging.WARNING):
        backend, choice = with_decode(Choice("triton", "auto"), *given)
    assert backend is torch_backend
    assert choice.name == "torch"
    why = "Triton's decode kernel cannot be compiled for heads of 16 in torch.float32: "
    assert why in choice.why
    assert f"rollout.attention: torch decodes instead of triton: {why}" in caplog.text
    with pytest.raises(ValueError, match=r"rollout.attention=triton cannot run here: .*; use rollout.attention=torch"):
        with_decode(Choice("triton", "rollout.attention=triton"), *given)
    assert with_decode(Choice("torch", "no CUDA"), *given) == (torch_backend, Choice("torch", "no CUDA"))

"""Blocks of FlexAttention's kernels: smaller ones for lack of shared memory, then the dense mask, nothing in silence."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from streams.memory import MemoryConfig
from streams.scoring import contiguous, flex_kernels, logprobs
from streams.scoring.block_mask import BLOCK
from streams.scoring.compiled import compile_count
from streams.scoring.flex_kernels import (
    CANDIDATES,
    EXACT,
    Heads,
    first_that_fits,
    flex_options,
    lacks_shared_memory,
    try_kernels,
)
from streams.scoring.logprobs import score_rows
from streams.scoring.mask import FlexPlan, block_mask
from streams.scoring.packing import pack
from tests.support.streams import joined_features, loud_backbone, random_turns, request, run

HEADS = Heads(16, 2, 128, torch.float32, torch.device("cuda"), lse=False, gradients=True)
REFUSED = (
    "No valid triton configs. OutOfResources: out of resource: shared memory, Required: 212992, Hardware limit: 101376. "
    "Reducing block sizes or `num_stages` may help."
)


def refusing(count, error):
    """An attempt that fails `count` times; and what it was asked for."""
    asked = []

    def attempt(options):
        asked.append(options)
        if len(asked) <= count:
            raise error

    return attempt, asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", range(len(CANDIDATES) + 1))
def test_the_first_blocks_that_fit_are_taken_and_smaller_ones_are_said(caplog, dtype, count):
    heads = Heads(16, 2, 128, dtype, torch.device("cuda"), lse=False, gradients=True)
    exact = EXACT if dtype == torch.float32 else ()
    attempt, asked = refusing(count, RuntimeError(REFUSED))
    with caplog.at_level(logging.WARNING):
        found = first_that_fits(heads, attempt)
    said = [record.getMessage() for record in caplog.records]
    if count == 0:
        assert (found, said) == (exact, [])
    elif count < len(CANDIDATES):
        assert found == exact + CANDIDATES[count]
        assert len(said) == 1
        side = 32 if count < 3 else 16
        assert f"heads of 128 need more shared memory than this GPU has; smaller blocks: fwd_BLOCK_M={side}" in said[0]
    else:
        assert found is None
        assert len(said) == 1
        assert "the dense mask is used instead" in said[0]
    assert asked == [exact + blocks for blocks in CANDIDATES[: count + 1]]


def test_another_failure_is_raised_and_not_tried_away():
    attempt, asked = refusing(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        first_that_fits(HEADS, attempt)
    assert len(asked) == 1
    assert not lacks_shared_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def test_the_words_of_triton_are_found_under_what_wraps_them():
    wrapped = RuntimeError("backend='inductor' raised")
    assert not lacks_shared_memory(wrapped)
    wrapped.__cause__ = ValueError(REFUSED)
    assert lacks_shared_memory(wrapped)


def test_the_blocks_divide_those_of_the_mask_and_shrink():
    for options in CANDIDATES[1:]:
        sides = [value for name, value in options if "BLOCK" in name]
        assert all(BLOCK % side == 0 and side >= 16 for side in sides)
    sizes = [dict(o)["fwd_BLOCK_N"] * dict(o)["fwd_num_stages"] for o in CANDIDATES[1:]]
    assert sizes == sorted(set(sizes), reverse=True)


def test_without_a_gpu_nothing_is_tried():
    assert flex_options(Heads(4, 2, 32, torch.float32, torch.device("cpu"), lse=False, gradients=False)) == ()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), EXACT + CANDIDATES[1]])
def test_the_trial_runs_the_compiled_kernel_and_rows_after_it_compile_nothing_more(options):
    torch._dynamo.reset()
    with torch.no_grad():
        if not flex_kernels.can_compile(torch.device("cpu"), torch.float32):
            pytest.skip("no C++ compiler, or a CPU without AVX2")
        before = compile_count()
        try_kernels(Heads(4, 2, 32, torch.float32, torch.device("cpu"), lse=False, gradients=False), options)
        tried = compile_count()
        assert tried > before
        for rows, length in ((1, 8 * BLOCK), (3, 4 * BLOCK)):
            ends = torch.full((rows, length), length)
            q, k, v = (torch.randn(rows, heads, length, 32) for heads in (4, 2, 2))
            FlexPlan(block_mask(ends, torch.zeros_like(ends)), options).attend(0, q, k, v, 32**-0.5)
        assert compile_count() == tried


@pytest.mark.parametrize("positions", ["native", "contiguous"])
def test_where_no_blocks_fit_the_dense_mask_scores_the_same(tmp_path, monkeypatch, positions):
    backbone = loud_backbone(tmp_path, torch.float32)
    memory = (
        MemoryConfig("recent_frames", 2)
        if positions == "native"
        else MemoryConfig("sink_window", 2, text_window=4, sink_tokens=4, tail_tokens=4, positions="contiguous")
    )
    asked = request(backbone, memory, random_turns(backbone, np.random.default_rng(0), 5), "s")
    rows, features = pack(run(backbone, [asked]), [[0]]), joined_features(asked)
    with torch.no_grad():
        wanted = score_rows(backbone, rows, features, attention="sdpa")
    kinds = []

    def none_fits(heads):
        kinds.append((heads.query, heads.kv, heads.dim, heads.lse, heads.gradients))
        return None

    for module in (logprobs, contiguous):
        monkeypatch.setattr(module, "flex_options", none_fits)
    got = score_rows(backbone, rows, features, attention="flex")
    torch.testing.assert_close(got.logp, wanted.logp, atol=1e-5, rtol=0)
    got.logp.sum().backward()
    text = backbone.model.config.text_config
    assert kinds == [(text.num_attention_heads, *backbone.kv_shape, positions == "contiguous", True)]

"""The compiled FlexAttention forward on CPU: equal to the eager one and to SDPA, and compiled a bounded number of times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from streams.memory import MemoryConfig
from streams.scoring.block_mask import BLOCK
from streams.scoring.compiled import can_compile, compile_count
from streams.scoring.logprobs import score_rows
from streams.scoring.mask import DensePlan, FlexPlan, block_mask, dense_mask
from streams.scoring.packing import pack
from tests.support.streams import joined_features, loud_backbone, random_turns, request, run

with torch.no_grad():
    COMPILES = can_compile(torch.device("cpu"), torch.float32)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not COMPILES, reason="no C++ compiler, or a CPU without AVX2"),
]

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
SCALE = HEAD_DIM**-0.5
GRAPHS = 3
"""More than one dtype and set of heads ever needs (torch 2.13: 2, a third if the first mask has as many blocks as KV heads)."""


def random_rows(rows, blocks, seed):
    """Expiry and lane of rows of random tokens, and queries, keys and values for them."""
    generator = torch.Generator().manual_seed(seed)
    length = blocks * BLOCK
    life = torch.randint(0, length, (rows, length), generator=generator)
    expiry = (torch.arange(length) + 1 + life).clamp(max=length)
    lane = torch.randint(0, 2, (rows, length), generator=generator)
    q, k, v = (torch.randn(rows, n, length, HEAD_DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))
    return expiry, lane, q, k, v


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_compiled_equals_eager_equals_the_dense_mask(rows, blocks, seed):
    expiry, lane, q, k, v = random_rows(rows, blocks, seed)
    with torch.no_grad():
        compiled = FlexPlan(block_mask(expiry, lane)).attend(0, q, k, v, SCALE)
        dense = DensePlan(dense_mask(expiry, lane)).attend(0, q, k, v, SCALE)
        first = flex_attention(
            q[:1], k[:1], v[:1], block_mask=block_mask(expiry[:1], lane[:1]), scale=SCALE, enable_gqa=True
        ).transpose(1, 2)
    torch.testing.assert_close(compiled, dense, atol=2e-5, rtol=0)
    torch.testing.assert_close(compiled[:1], first, atol=2e-5, rtol=0)


def test_the_number_of_compilations_does_not_grow_with_the_data():
    before = compile_count()
    with torch.no_grad():
        for i, (rows, blocks) in enumerate([(1, 2), (3, 2), (1, 5), (2, 3), (4, 2), (1, 8), (2, 7)]):
            expiry, lane, q, k, v = random_rows(rows, blocks, i)
            # Projections come as [R, L, H, D] seen from another side.
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
            FlexPlan(block_mask(expiry, lane)).attend(0, q, k, v, SCALE)
    assert compile_count() - before <= GRAPHS


def test_a_backbone_scores_the_same_under_the_compiled_block_mask(tmp_path):
    backbone = loud_backbone(tmp_path, torch.float32)
    rng = np.random.default_rng(0)
    memory = [MemoryConfig("rcsm", 2), MemoryConfig("recent_frames", 2)]
    requests = [request(backbone, memory[i % 2], random_turns(backbone, rng, 5 + i), f"s{i}") for i in range(4)]
    logs = run(backbone, requests)
    features = torch.cat([joined_features(r) for r in requests])
    before = compile_count()
    with torch.no_grad():
        for layout in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2, 3]]):
            rows = pack(logs, layout)
            dense = score_rows(backbone, rows, features, attention="sdpa")
            flex = score_rows(backbone, rows, features, attention="flex")
            torch.testing.assert_close(flex.logp, dense.logp, atol=3e-4, rtol=0)
    # All layers of all batches share what was compiled.
    assert compile_count() > 0
    assert compile_count() - before <= GRAPHS
    with torch.no_grad():
        wrong = score_rows(backbone, _without_eviction(pack(logs, [[0, 1, 2, 3]])), features, attention="flex")
        right = score_rows(backbone, pack(logs, [[0, 1, 2, 3]]), features, attention="sdpa")
    assert (wrong.logp - right.logp).abs().max() > 1e-2


def _without_eviction(rows):
    rows.expiry.fill_(rows.expiry.shape[1])
    return rows

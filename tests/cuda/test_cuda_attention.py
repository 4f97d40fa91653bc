"""On a GPU: the compiled FlexAttention against SDPA, FlashInfer against the torch backend, flash-attn against SDPA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.timing import medians_ms
from rollout.attention import Segment, make_backend
from rollout.engine.kv_pool import KVPool
from streams.backbone.backbone import Backbone
from streams.backbone.kernel_choice import choose_vision_attention, has_module
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig
from streams.scoring.block_mask import BLOCK
from streams.scoring.compiled import compile_count
from streams.scoring.flex_kernels import CANDIDATES, EXACT, Heads, flex_options
from streams.scoring.mask import DensePlan, FlexPlan, block_mask, dense_mask

pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.timeout(900)]

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
SCALE = HEAD_DIM**-0.5


def random_rows(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    life = torch.randint(0, length, (rows, length), generator=generator)
    expiry = (torch.arange(length) + 1 + life).clamp(max=length)
    lane = torch.randint(0, 2, (rows, length), generator=generator)
    q, k, v = (torch.randn(rows, n, length, HEAD_DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))
    return [t.cuda() for t in (expiry, lane, q, k, v)]


def with_gradients(plan, q, k, v):
    q, k, v = (t.detach().clone().requires_grad_(True) for t in (q, k, v))
    out = plan.attend(0, q, k, v, SCALE)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture
def full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_flex_forward_and_backward_equal_sdpa_at_3b_heads(full_precision):
    expiry, lane, q, k, v = random_rows(1, 4096, 0)
    # Heads of 128 in float32 want more shared memory than some GPUs have: with the blocks that fit.
    heads = Heads(HEADS, KV_HEADS, HEAD_DIM, torch.float32, q.device, lse=False, gradients=True)
    options = flex_options(heads)
    assert options is not None
    flex = with_gradients(FlexPlan(block_mask(expiry, lane), options), q, k, v)
    dense = with_gradients(DensePlan(dense_mask(expiry, lane)), q, k, v)
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), flex, dense, strict=True):
        assert relative(got, wanted) <= 1e-4, name
    # And the comparison can fail: without eviction everything is far away.
    never = torch.full_like(expiry, expiry.shape[1])
    wrong = with_gradients(FlexPlan(block_mask(never, lane), options), q, k, v)
    assert all(relative(got, wanted) > 1e-2 for got, wanted in zip(wrong, dense, strict=True))


@pytest.mark.parametrize("blocks", CANDIDATES[1:])
def test_every_smaller_choice_of_blocks_computes_the_same(full_precision, blocks):
    expiry, lane, q, k, v = random_rows(1, 2048, 3)
    dense = with_gradients(DensePlan(dense_mask(expiry, lane)), q, k, v)
    flex = with_gradients(FlexPlan(block_mask(expiry, lane), EXACT + blocks), q, k, v)
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), flex, dense, strict=True):
        assert relative(got, wanted) <= 1e-4, name


def test_events_time_what_the_device_does():
    a = torch.randn(4096, 4096, device="cuda")
    found = medians_ms({"one": lambda: a @ a, "three": lambda: a @ a @ a @ a}, "cuda", 10)
    assert 2.0 < found["three"] / found["one"] < 4.5


def test_flex_compiles_no_more_often_than_it_must():
    before = compile_count()
    for i, (rows, blocks) in enumerate([(1, 2), (3, 2), (1, 5), (2, 3), (4, 2), (1, 9)]):
        expiry, lane, q, k, v = random_rows(rows, blocks * BLOCK, i)
        q, k, v = (t.bfloat16() for t in (q, k, v))
        with_gradients(FlexPlan(block_mask(expiry, lane)), q, k, v)
    assert compile_count() - before <= 4


needs_flashinfer = pytest.mark.skipif(not has_module("flashinfer"), reason="flashinfer-python is not installed")


def segments_of(rng, pool, lengths):
    """(rows, live slots) per segment -> segments with slots anywhere in the pool, in no order, others' in between."""
    segments, at = [], 0
    for rows, live in lengths:
        slots = pool.book.allocate(live)
        rng.shuffle(slots)
        segments.append(Segment(at, rows, slots))
        at += rows
    return segments


def pools(slots, kv_heads, head_dim):
    """A pool of pages, and one of blocks with the same keys and values under the same slots."""
    paged, blocks = (
        KVPool(slots, 2, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda", paged=p) for p in (True, False)
    )
    paged.kv.normal_()
    blocks.kv.copy_(paged.kv.permute(0, 2, 3, 1, 4))
    return paged, blocks


@needs_flashinfer
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(16, 2), (14, 2), (8, 8), (5, 1)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1), (1, 200), (1, 37), (1, 1000)],
        [(206, 206), (40, 900), (2, 3), (300, 301)],
        [(1, 700), (206, 1500), (1, 1), (3, 64), (1, 20)],
    ],
    ids=["ends", "prefill", "mixed"],
)
def test_flashinfer_equals_the_torch_backend(head_dim, heads, lengths):
    rng = np.random.default_rng(0)
    query, kv = heads
    slots = sum(live for _, live in lengths)
    paged, blocks = pools(2 * slots, kv, head_dim)
    paged.book.free(paged.book.allocate(slots)[::2])
    segments = segments_of(rng, paged, lengths)
    torch_backend, flashinfer = (
        make_backend("torch", blocks, query // kv),
        make_backend("flashinfer", paged, query // kv),
    )
    tokens = sum(rows for rows, _ in lengths)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(2):
        # Twice, as forwards follow one another: the workspace is used again.
        attends = torch_backend.segments(segments), flashinfer.segments(segments)
        for layer in range(2):
            q = torch.randn(query, tokens, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
            wanted, found = (attend(layer, q, head_dim**-0.5).float() for attend in attends)
            assert found.shape == (tokens, query, head_dim)
            torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@needs_flashinfer
def test_flashinfer_decodes_over_a_table_as_the_torch_backend_does_over_blocks():
    paged, blocks = pools(1024, KV_HEADS, HEAD_DIM)
    table = torch.arange(1024, device="cuda").view(4, 256)
    seats, lengths = torch.tensor([3, 0, 2], device="cuda"), torch.tensor([256, 1, 100], device="cuda")
    q = torch.randn(HEADS, 3, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    found, wanted = (
        make_backend(name, pool, HEADS // KV_HEADS).decode(table, seats, lengths)(1, q, SCALE).float()
        for name, pool in (("flashinfer", paged), ("torch", blocks))
    )
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@needs_flashinfer
def test_flashinfer_sees_only_the_slots_it_is_given():
    pool, _ = pools(512, KV_HEADS, HEAD_DIM)
    backend = make_backend("flashinfer", pool, HEADS // KV_HEADS)
    slots = pool.book.allocate(300)
    segment = Segment(0, 4, slots)
    q = torch.randn(HEADS, 4, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    first = backend.segments([segment])(0, q, SCALE)
    outside = np.setdiff1d(np.arange(512), slots)
    pool.kv[0, torch.from_numpy(outside).cuda()] = 100.0
    assert torch.equal(backend.segments([segment])(0, q, SCALE), first)
    pool.kv[0, int(slots[0])] = 100.0
    assert not torch.equal(backend.segments([segment])(0, q, SCALE), first)


@pytest.mark.skipif(not has_module("flash_attn"), reason="flash-attn is not installed")
@pytest.mark.parametrize("vision_heads", [4, 2])
def test_the_tower_makes_the_same_features_with_flash_attn(tmp_path, vision_heads):
    path = build_tiny(tmp_path / "tiny", TinySpec(vision_hidden=256, vision_heads=vision_heads), seed=3)
    assert choose_vision_attention("auto", "cuda", "bfloat16").name == "flash_attn"
    clip = np.random.default_rng(0).integers(0, 255, (3, 2, 84, 112, 3), np.uint8)
    features = {}
    for kernel in ("sdpa", "flash_attn"):
        backbone = Backbone.load(path, LayoutConfig(), dtype=torch.bfloat16, device="cuda", vision_attention=kernel)
        with torch.no_grad():
            features[kernel] = backbone.encode_video([clip])[0].float()
    assert float((features["flash_attn"] - features["sdpa"]).abs().mean()) <= 1e-2
    assert relative(features["flash_attn"], features["sdpa"]) <= 2e-2

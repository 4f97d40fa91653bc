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


def step_of(rng, pool, lengths):
    """(new slots, segments): (rows, live slots) per segment, its slots anywhere in the pool, its own tokens last."""
    segments, new, at = [], [], 0
    for rows, live in lengths:
        # As after evictions: slots in no order, with others' in between.
        slots = pool.allocate(live)
        rng.shuffle(slots)
        segments.append(Segment(at, rows, slots))
        new.append(slots[-rows:])
        at += rows
    return np.concatenate(new), segments


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
    ids=["decode", "prefill", "mixed"],
)
def test_flashinfer_equals_the_torch_backend(head_dim, heads, lengths):
    rng = np.random.default_rng(0)
    query, kv = heads
    slots = sum(live for _, live in lengths)
    pool = KVPool(2 * slots, 2, kv, head_dim, dtype=torch.bfloat16, device="cuda")
    pool.kv.normal_()
    pool.free(pool.allocate(slots)[::2])
    new, segments = step_of(rng, pool, lengths)
    backends = {name: make_backend(name, pool, query // kv) for name in ("torch", "flashinfer")}
    tokens = sum(rows for rows, _ in lengths)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(2):
        # Twice, as steps follow one another: the workspace is used again.
        plans = {name: backend.plan(new, segments) for name, backend in backends.items()}
        for layer in range(2):
            q, k, v = (
                torch.randn(1, n, tokens, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
                for n in (query, kv, kv)
            )
            outs = {name: plan.attend(layer, q, k, v, head_dim**-0.5).float() for name, plan in plans.items()}
            assert outs["flashinfer"].shape == (1, tokens, query, head_dim)
            torch.testing.assert_close(outs["flashinfer"], outs["torch"], atol=2e-2, rtol=2e-2)
            assert torch.equal(pool.kv[layer, torch.from_numpy(new).cuda(), 0], k[0].transpose(0, 1))


@needs_flashinfer
def test_flashinfer_sees_only_the_slots_it_is_given():
    pool = KVPool(512, 1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    backend = make_backend("flashinfer", pool, HEADS // KV_HEADS)
    slots = pool.allocate(300)
    segment = Segment(0, 4, slots)
    q, k, v = (torch.randn(1, n, 4, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS))
    first = backend.plan(slots[-4:], [segment]).attend(0, q, k, v, SCALE)
    outside = np.setdiff1d(np.arange(512), slots)
    pool.kv[0, torch.from_numpy(outside).cuda()] = 100.0
    assert torch.equal(backend.plan(slots[-4:], [segment]).attend(0, q, k, v, SCALE), first)
    pool.kv[0, int(slots[0])] = 100.0
    assert not torch.equal(backend.plan(slots[-4:], [segment]).attend(0, q, k, v, SCALE), first)


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

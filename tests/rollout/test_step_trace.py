"""A decode step at 3B shapes on fake CUDA tensors: nothing in it keeps a CUDA graph from holding it."""

from __future__ import annotations

import pytest
import torch

from rollout.attention.torch_sdpa import TorchBackend
from rollout.decode.decoder import Decoder
from rollout.decode.state import Kinds
from rollout.engine.kv_pool import KVPool
from streams.backbone.tiny_spec import TinySpec
from tests.support.fake_cuda import NotCapturable, Watch, fake_backbone, fake_mode, storages

pytest.importorskip("triton")
from rollout.attention.triton_decode import TritonDecodeBackend

SEATS, STEPS, WIDTH, SLOTS = 64, 8, 4096, 200_000
SPECS = {
    "Qwen2.5-VL-3B": TinySpec(
        hidden=2048, layers=36, heads=16, kv_heads=2, mlp=11008, vocab_rows=151936, tie_embeddings=True
    ),
    "Qwen3-VL-4B": TinySpec(
        model_type="qwen3_vl",
        hidden=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=9728,
        vocab_rows=151936,
        tie_embeddings=True,
    ),
}


@pytest.fixture(scope="module", params=SPECS)
def traced(request):
    """A mode, and a backbone in it."""
    mode = fake_mode()
    with mode, torch.no_grad():
        backbone = fake_backbone(SPECS[request.param])
    return mode, backbone


def made(backbone, *, paged: bool, attention: str = "triton") -> tuple[Decoder, KVPool]:
    kv_heads, head_dim = backbone.kv_shape
    groups = backbone.model.config.text_config.num_attention_heads // kv_heads
    shape = (backbone.num_layers, kv_heads, head_dim)
    pool = KVPool(SLOTS, *shape, dtype=backbone.dtype, device=backbone.device, paged=paged)
    pool.keep_raw()
    backend = None if paged else TorchBackend(pool, groups)
    if attention == "triton":
        backend = TritonDecodeBackend(pool, backend, groups)
    decoder = Decoder(backbone, pool, backend, SEATS, STEPS)
    decoder.state.make_room(WIDTH, 0)
    return decoder, pool


def static(decoder: Decoder, pool: KVPool, backbone) -> dict[str, torch.Tensor]:
    """Everything that a step reads or writes and that a graph would know by its address."""
    buffers = {name: t for name, t in vars(decoder.state).items() if isinstance(t, torch.Tensor)}
    return buffers | {"kv": pool.kv, "raw": pool.raw} | dict(backbone.model.named_parameters())


def step(decoder: Decoder, pool: KVPool, backbone, kinds: Kinds) -> Watch:
    """Run one step, watched; raises NotCapturable."""
    seats = torch.arange(SEATS, device=backbone.device)
    # Made once and kept, before anything is captured.
    _ = backbone.rotary
    before = storages(static(decoder, pool, backbone))
    with Watch() as watch:
        decoder.step(seats, kinds)
    after = storages(static(decoder, pool, backbone))
    if moved := [name for name in before if before[name] != after[name]]:
        raise NotCapturable(f"{', '.join(moved)}: another storage than before the step")
    return watch


@pytest.mark.parametrize(
    ("paged", "contiguous", "greedy"),
    [(True, False, False), (True, True, None), (True, False, True), (False, False, False), (False, True, None)],
)
def test_nothing_in_a_step_waits_for_the_host_or_leaves_its_buffers(traced, paged, contiguous, greedy):
    mode, backbone = traced
    with mode, torch.no_grad():
        decoder, pool = made(backbone, paged=paged)
        watch = step(decoder, pool, backbone, Kinds(contiguous, greedy))
    assert backbone.num_layers == 36
    assert watch.calls["sightline::decode_attention"] == 36
    # The keys of every layer are written, blocks and un-rotated keys apart.
    assert watch.calls["aten::index_copy_"] == 36 * ((1 if paged else 2) + contiguous)
    assert watch.calls["aten::searchsorted"] == (greedy is not True)
    assert watch.calls["aten::index_put_"] == 3, "what was drawn, its log-prob, and the state"
    assert 40 * 36 < watch.launches < (65 + 15 * contiguous) * 36, "docs/engine.md says how many"


@pytest.mark.parametrize(("name", "launches"), [("Qwen2.5-VL-3B", 673), ("Qwen3-VL-4B", 747)])
def test_fused_kernels_leave_less_than_half_of_the_launches(name, launches):
    mode = fake_mode()
    with mode, torch.no_grad():
        backbone = fake_backbone(SPECS[name], fused_kernels="triton")
        watch = step(*made(backbone, paged=False), backbone, Kinds())
    # Two norms a layer and one at the end; Qwen3-VL normalises queries and keys, too.
    norms = 36 * (4 if backbone.name == "qwen3_vl" else 2) + 1
    assert watch.calls["sightline::rms_norm"] == norms
    assert watch.calls["sightline::rotate"] == watch.calls["sightline::silu_times"] == 36
    assert not {"aten::rsqrt", "aten::neg", "aten::silu"} & watch.calls.keys()
    assert abs(watch.launches - launches) < 20, "docs/engine.md says how many"


FAULTS = {
    "item": (lambda state: state.ints.sum().item(), "the host reads a value"),
    "a condition": (lambda state: bool(state.ints[0, 0] > 0), "the host reads a value"),
    "a list": (lambda state: state.ints[0].tolist(), "the host reads a value"),
    "equal": (lambda state: torch.equal(state.ids, state.ids), "the host reads a value"),
    "to the host": (lambda state: state.ints.cpu(), "tensors on cpu, cuda"),
    "into a host's buffer": (lambda state: torch.empty(65).copy_(state.scale), "tensors on cpu"),
    "from the host": (lambda state: state.scale.copy_(torch.ones(65)), "tensors on cpu"),
    "a list as index": (lambda state: state.ints[[1, 2]], "tensors on cpu"),
    "a tensor of numbers": (lambda state: torch.tensor([1, 2], device=state.ints.device), "tensors on cpu"),
    "nonzero": (lambda state: state.ints.nonzero(), "a shape depends on values"),
    "a mask as index": (lambda state: state.ids[state.ids > 0], "a shape depends on values"),
    "a masked write": (
        lambda state: state.ids.__setitem__(state.ids > 0, state.ids[0, :1]),
        "a shape depends on values",
    ),
    "masked_select": (lambda state: torch.masked_select(state.ids, state.ids > 0), "a shape depends on values"),
    "a new buffer": (lambda state: setattr(state, "ids", state.ids.clone()), "ids: another storage"),
    "another storage": (lambda state: setattr(state.ids, "data", state.ids.clone()), "another storage"),
    "set_": (lambda state: state.ids.set_(state.ids.clone()), "a tensor gets another storage"),
    "a wider table": (lambda state: state.make_room(2 * WIDTH, 0), "table: another storage"),
}
"""Name -> (what a step must not do, what is said of it)."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle_of_a_step_is_seen(traced, fault, monkeypatch):
    mode, backbone = traced
    commit, said = FAULTS[fault]
    with mode, torch.no_grad():
        decoder, pool = made(backbone, paged=True)
        values = pool.values

        def faulty(layer: int) -> torch.Tensor:
            if layer == 3:
                commit(decoder.state)
            return values(layer)

        monkeypatch.setattr(pool, "values", faulty)
        with pytest.raises(NotCapturable, match=said):
            step(decoder, pool, backbone, Kinds())


def test_a_backend_that_plans_on_the_host_is_seen(traced):
    mode, backbone = traced
    with mode, torch.no_grad():
        decoder, pool = made(backbone, paged=False, attention="torch")
        with pytest.raises(NotCapturable, match="tensors on cpu, cuda"):
            step(decoder, pool, backbone, Kinds())

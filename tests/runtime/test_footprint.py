"""What is said of memory before anything loads is what the loaded thing then holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from learner.batching import idle_rows
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.long_streams.activation_checkpointing import checkpoint_activations
from learner.setup import LearnerSetup
from rollout.engine.engine import Engine
from runtime.planning.device_plan import MARGIN, PoolNeed, Process, plan_device_memory, plan_devices
from runtime.planning.footprint import (
    Footprint,
    layer_bytes,
    learner_footprint,
    region_bytes,
    slot_bytes,
    trained_numbers,
    worker_footprint,
)
from runtime.planning.stream_size import StreamSize
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec
from streams.checkpoint.model_shape import ModelGeometry
from streams.layout.layout import LayoutConfig
from streams.scoring.contiguous_rows import RegionRows
from streams.scoring.logprobs import attention_plan
from streams.scoring.mask import DensePlan, dense_mask
from streams.support.usage import DeviceInfo
from streams.task import ExpectedAnswer
from tests.support.configs import composed
from tests.support.one_gpu import AS_SET, GIB, H200, TASKS, planned, smoke, three_b

SPECS = {"qwen2_5_vl": TinySpec(tie_embeddings=True), "qwen3_vl": replace(QWEN3_SPEC, head_dim=48)}


@pytest.fixture(scope="module", params=SPECS)
def checkpoint(request, tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp(request.param), SPECS[request.param])


def test_the_geometry_in_the_files_is_that_of_the_loaded_model(checkpoint):
    geometry, backbone = ModelGeometry.read(checkpoint), Backbone.load(checkpoint, LayoutConfig())
    assert geometry.total == sum(p.numel() for p in backbone.model.parameters())
    assert (geometry.kv_heads, geometry.head_dim) == backbone.kv_shape
    assert geometry.layers == backbone.num_layers
    assert geometry.feature_width == backbone.feature_width
    assert geometry.token_side == backbone.image.patch_size * backbone.image.merge_size
    assert geometry.model_type == backbone.name
    assert geometry.vocab == backbone.model.lm_head.weight.shape[0]


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, damage):
    folder = build_tiny(tmp_path / "model", TinySpec(hidden=64, layers=1))
    (folder / damage).unlink()
    with pytest.raises(ValueError, match=rf"{folder}: config\.json or the weights' headers cannot be read"):
        ModelGeometry.read(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 777])
def test_the_bytes_of_a_kv_pool_are_exact(checkpoint, dtype, slots):
    backbone = Backbone.load(checkpoint, LayoutConfig(), dtype=getattr(torch, dtype))
    pool = Engine(backbone, kv_slots=slots, max_streams=1).pool
    # One slot belongs to nobody.
    assert pool.kv.untyped_storage().nbytes() == (slots + 1) * slot_bytes(ModelGeometry.read(checkpoint), dtype)


def kept_by_autograd(folder, spec, dtype, tokens=192):
    """Bytes of the distinct storages that one forward of the text model keeps, parameters aside."""
    backbone = Backbone.load(build_tiny(folder, spec), LayoutConfig(), dtype=dtype)
    mask = dense_mask(torch.full((1, tokens), tokens), torch.zeros(1, tokens, dtype=torch.long))
    return kept_under(backbone, DensePlan(mask), tokens), mask.untyped_storage().nbytes()


def kept_under(backbone, plan, tokens):
    own = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    positions = torch.arange(tokens).expand(3, 1, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.hidden(torch.arange(tokens)[None] % 100, positions, plan)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wide", [{}, {"hidden": 256, "heads": 8}, {"mlp": 768}, {"kv_heads": 4}])
@pytest.mark.parametrize("family", SPECS)
def test_what_a_layer_keeps_for_its_backward_is_what_autograd_keeps(tmp_path, family, wide, dtype):
    spec = replace(SPECS[family], layers=3, **wide)
    more, mask = kept_by_autograd(tmp_path / "four", replace(spec, layers=4), getattr(torch, dtype))
    less, _ = kept_by_autograd(tmp_path / "three", spec, getattr(torch, dtype))
    geometry = ModelGeometry.read(tmp_path / "three")
    said, _ = layer_bytes(geometry, getattr(torch, dtype).itemsize, dense=True)
    # A boolean mask is kept by every layer as numbers to add; the learner's estimate counts it apart.
    additive = mask * getattr(torch, dtype).itemsize
    assert (more - less - additive) / 192 == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_contiguous_positions_add_to_a_layer_is_what_autograd_keeps(tmp_path, dtype):
    tokens, copies = 192, 128
    bounds = (0, 16, 32, 48, 64, copies)
    none = torch.zeros((1, copies), dtype=torch.long)
    row = torch.arange(tokens)[None]
    regions = RegionRows(row.expand(3, 1, -1), row.expand(5, 1, -1), none, none, none, none + tokens, bounds)
    kept = {}
    for layers in (3, 4):
        backbone = Backbone.load(
            build_tiny(tmp_path / str(layers), TinySpec(layers=layers)), LayoutConfig(), dtype=dtype
        )
        rows = replace(idle_rows(0), ids=row, expiry=row * 0 + tokens, lane=row * 0, regions=regions)
        kept[layers] = kept_under(backbone, attention_plan(rows, "sdpa", backbone), tokens)
    geometry = ModelGeometry.read(tmp_path / "3")
    plain, _ = layer_bytes(geometry, dtype.itemsize, dense=True)
    more, _ = region_bytes(geometry, dtype.itemsize, tokens, copies / tokens / 2, dense=True)
    assert (kept[4] - kept[3]) / tokens == pytest.approx(plain + more, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_pool_with_unrotated_keys_are_exact(checkpoint, dtype):
    backbone = Backbone.load(checkpoint, LayoutConfig(), dtype=getattr(torch, dtype))
    pool = Engine(backbone, kv_slots=77, max_streams=1).pool
    held = pool.kv.untyped_storage().nbytes() + pool.keep_raw().untyped_storage().nbytes()
    assert held == (77 + 1) * slot_bytes(ModelGeometry.read(checkpoint), dtype, "contiguous")


# ---- fitting ---------------------------------------------------------------------------------------------------


def test_a_3b_loop_fits_one_large_gpu_with_the_pools_at_their_largest():
    plan = planned(smoke())
    stream = StreamSize.largest(smoke(), TASKS, three_b())
    assert (stream.turns, stream.video) == (20, 192)
    assert plan.kv_slots == 16 * stream.live(smoke())
    assert slot_bytes(three_b(), "bfloat16") == 36 * 2 * 2 * 128 * 2 == 36 * 1024
    assert sum(f.total for f in plan.footprints) < H200.free * (1 - MARGIN)
    assert any("learner" in line and "weights" in line and "optimiser step" in line for line in plan.lines)


def test_a_smaller_gpu_gets_smaller_pools_and_then_none():
    large = planned(smoke(*AS_SET))
    others = sum(f.total for f in large.footprints) - dict(large.footprints[0].parts)["KV pool"]
    tight = replace(H200, free=int((others + GIB // 2) / (1 - MARGIN)))
    assert 0 < planned(smoke(*AS_SET), tight).kv_slots * 36 * 1024 <= GIB // 2
    with pytest.raises(
        ValueError, match=r"largest stream may hold [\d,]+ tokens .* but what is left of the device gives"
    ):
        planned(smoke(*AS_SET), replace(H200, free=int((others + 20 * 2**20) / (1 - MARGIN))))
    with pytest.raises(
        ValueError, match=r"GiB too many\. Ways out: learner\.offload=cpu, a smaller learner.*weights\.staging=host"
    ):
        planned(smoke(*AS_SET), replace(H200, free=40 * GIB))


def test_offload_and_host_staging_take_their_bytes_off_the_device():
    base = {f.process: f for f in planned(smoke()).footprints}
    lean = {f.process: f for f in planned(smoke("learner.offload=cpu", "weights.staging=host")).footprints}
    trained = 3_754_622_976 - 668_683_264
    # Besides the optimiser's states, the flat copies of the gradients that its step takes.
    step = dict(base["learner"].parts)["optimiser step"]
    working = {name: size for name, size in lean["learner"].parts if name in ("backward", "optimiser step")}
    assert base["learner"].total - lean["learner"].total == 12 * trained + step - sum(working.values())
    assert step == 8 * trained > sum(working.values()) >= 2 * trained
    assert lean["learner"].host - base["learner"].host == 16 * trained
    assert base["rollout worker"].total - lean["rollout worker"].total == 2 * trained


def test_the_copy_that_a_checkpoint_is_written_from_is_in_the_estimate_where_it_lies():
    trained, total = 3_754_622_976 - 668_683_264, 3_754_622_976
    by_name = {}
    for optimizer in ("none", "all"):
        (found,) = (f for f in planned(smoke(f"checkpoint.optimizer={optimizer}")).footprints if f.process == "learner")
        by_name[optimizer] = found
    # What is published, and the weights; the optimiser's state besides.
    assert by_name["none"].host == 2 * trained + 2 * total
    assert by_name["all"].host - by_name["none"].host == 12 * trained
    assert by_name["all"].total == by_name["none"].total
    host = DeviceInfo("n/host", "the host memory of n", False, 500 * GIB, 400 * GIB)
    (here,) = (f for f in planned(smoke("checkpoint.optimizer=all"), host).footprints if f.process == "learner")
    assert dict(here.parts)["checkpoint copy"] == 2 * total + 12 * trained


def test_a_pool_too_small_for_one_stream_is_refused_with_the_arithmetic():
    with pytest.raises(
        ValueError, match=r"largest stream may hold .*36,864 bytes each: .* but rollout\.kv_memory_mb gives"
    ):
        planned(smoke("rollout.kv_memory_mb=16"))
    with pytest.raises(
        ValueError, match=r"are left for 1 KV pools, but rollout\.kv_memory_mb asks for 97\.66 GiB each"
    ):
        planned(smoke("rollout.kv_memory_mb=100000"))


def test_a_memory_that_cannot_work_is_refused_before_anything_loads():
    with pytest.raises(ValueError, match=r"memory\.video_tokens=191 cannot hold one chunk of 192 video tokens"):
        planned(smoke("memory=visual_budget", "memory.video_tokens=191"))
    assert planned(smoke("memory=visual_budget", "memory.video_tokens=192"))
    short = smoke("memory.window=8", "memory.text_window=7")
    assert planned(short)
    timed = replace(three_b(), model_type="qwen3_vl")
    with pytest.raises(
        ValueError, match=r"text stays for 7 turns \(memory\.text_window\) but video for memory\.window=8"
    ):
        plan_devices(short, {"rl": short.learner}, timed, TASKS, ([H200], [H200]))


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory.window=4", "memory.text_window=6"),
        (
            "memory=sink_window",
            "memory.window=4",
            "memory.text_window=6",
            "memory.sink_tokens=8",
            "memory.tail_tokens=8",
        ),
        ("memory=visual_budget", "memory.video_tokens=768"),
    ],
)
def test_a_memory_that_keeps_less_needs_less_room(overrides):
    tight, whole = smoke(*overrides), smoke("memory=full")
    stream = StreamSize.largest(tight, TASKS, three_b())
    assert stream.live(tight) < stream.live(whole) == stream.tokens
    assert planned(tight).kv_slots == 16 * stream.live(tight)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others():
    config, geometry = smoke(*AS_SET), three_b()
    stream = StreamSize.largest(config, TASKS, geometry)

    def total(checkpointing):
        learner = replace(config.learner, activation_checkpointing=checkpointing)
        return learner_footprint(
            geometry, learner, geometry.total, stream, 16, tower_trains=False, reference=False, flex=True, fused=True
        ).total

    # 36 layers keep about 130 KiB of each of 14,000 tokens.
    assert 40 * GIB < total(False) - total(True) < 80 * GIB


@settings(max_examples=60)
@given(
    free=st.integers(1, 200),
    learners=st.lists(st.integers(1, 60), max_size=2),
    workers=st.integers(1, 4),
    largest=st.integers(1, 5000),
    streams=st.integers(1, 64),
    given_mib=st.integers(0, 4000),
)
def test_a_plan_fits_and_every_refusal_says_by_how_much(free, learners, workers, largest, streams, given_mib):
    device = DeviceInfo("k", "the GPU", True, free * GIB, free * GIB)
    need = PoolNeed(36 * 1024, largest, streams, given_mib * 2**20)

    def worker(kv):
        return Footprint("rollout worker", (("weights", 7 * GIB), ("KV pool", kv)))

    processes = [Process(worker(0), device, kv=True) for _ in range(workers)]
    processes += [Process(Footprint("learner", (("weights", size * GIB),)), device) for size in learners]
    fixed = sum(size * GIB for size in learners) + workers * 7 * GIB
    possible = (int(device.free * (1 - MARGIN)) - fixed) // workers // need.slot
    wanted = need.given // need.slot if given_mib else largest * streams
    if possible < (wanted if given_mib else largest) or wanted < largest:
        with pytest.raises(ValueError, match=r"[\d.]+ (GiB|MiB)"):
            plan_device_memory(processes, need, worker)
        return
    plan = plan_device_memory(processes, need, worker)
    assert fixed + workers * plan.kv_slots * need.slot <= device.free * (1 - MARGIN)
    assert largest <= plan.kv_slots == (wanted if given_mib else min(wanted, possible))


def test_a_worker_counts_its_weights_twice_while_an_update_waits():
    config, geometry = smoke(*AS_SET), three_b()
    stream = StreamSize.largest(config, TASKS, geometry)
    parts = dict(worker_footprint(geometry, "bfloat16", geometry.total, stream, config, 0).parts)
    assert parts["weights"] == parts["staged weights"] == 2 * geometry.total


def test_the_largest_stream_that_a_worker_re_scores_has_room():
    """By FlexAttention on a GPU; a dense mask, where that is asked for, grows with the square of the stream."""
    long = ("data.max_turns=300", "data.tail_chunks=300", "rollout.max_streams=1")
    tasks = (replace(TASKS[0], end=300.0),)

    def parts(*overrides, device=H200):
        plan = plan_devices(smoke(*long, *overrides), {}, three_b(), tasks, ([device], [device]))
        return dict(plan.footprints[0].parts)

    assert (tokens := StreamSize.largest(smoke(*long), tasks, three_b()).tokens) > 60_000
    assert parts("learner.attention=sdpa")["self-check"] > 3 * tokens**2 > parts()["self-check"]
    assert "self-check" not in parts("learner.attention=sdpa", "monitor.every=0")
    with pytest.raises(ValueError, match=r"self-check [\d.]+ GiB\).*Ways out: .*monitor\.every=0"):
        parts("learner.attention=sdpa", device=replace(H200, free=16 * GIB))


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_the_optimiser_holds_what_was_said(checkpoint, ranks, dtype, stage):
    """DeepSpeed's float32 copies and AdamW's moments, after a step of a real learner."""
    values = LearnerConfig(dtype=dtype, zero_stage=stage, freeze="tower+merger", micro_batch_tokens=256)
    learner = LearnerEngine(LearnerSetup(str(checkpoint), LayoutConfig(), values, 1, 0), ranks)
    try:
        trained = list(learner.backbone.trainable().values())
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimiser = learner.deepspeed.optimizer
        base = optimiser if stage == 0 else optimiser.optimizer
        if stage:
            for copy in optimiser.single_partition_of_fp32_groups:
                copy.grad = torch.ones_like(copy)
        base.step()
        tensors = [t for state in base.state.values() for t in state.values() if t.ndim]
        if stage:
            tensors += optimiser.single_partition_of_fp32_groups
        held = sum(tensor.nbytes for tensor in tensors)
    finally:
        learner.close()
    geometry = ModelGeometry.read(checkpoint)
    numbers = trained_numbers(geometry, values)
    assert numbers == sum(p.numel() for p in trained)
    stream = StreamSize(10, 4, 20, 10)
    said = learner_footprint(
        geometry, values, numbers, stream, 8, tower_trains=False, reference=False, flex=False, fused=False
    )
    # DeepSpeed pads its flat copies.
    assert held == pytest.approx(dict(said.parts)["optimiser"], rel=1e-3)


def test_ways_out_leave_out_what_is_set_already():
    lean = smoke("learner.offload=cpu", "weights.staging=host")
    with pytest.raises(ValueError, match=r"too many\. Ways out: (.*)") as refused:
        planned(lean, replace(H200, free=20 * GIB))
    ways = str(refused.value).partition("Ways out: ")[2]
    assert "micro_batch_tokens" in ways
    assert "cluster.placement=separated" in ways
    assert not any(word in ways for word in ("offload", "freeze", "activation_checkpointing", "staging"))


def test_the_published_preset_fits_gpus_of_80_gb_and_not_without_checkpointing():
    """120 turns in a row, the tower trained: its blocks, too, compute their activations again."""
    own = ("data.train=a.jsonl", "data.heldout=b.jsonl", "learner.ranks=8", "learner.zero_stage=2")
    tasks = (replace(TASKS[0], end=120.0, answers=(ExpectedAnswer(115.0, "red"),)),)
    ranks = [DeviceInfo(f"l{i}", f"rank {i}", True, 80 * GIB, 79 * GIB) for i in range(8)]
    workers = [DeviceInfo(f"w{i}", f"worker {i}", True, 80 * GIB, 79 * GIB) for i in range(2)]

    def plan(*overrides):
        config = composed("experiment=thinkstream_qwen2_5_vl_3b", *own, *overrides)
        stages = {"sft": config.sft_learner(1), "rl": config.rl_learner(1)}
        return plan_devices(config, stages, three_b(), tasks, (ranks, workers))

    assert plan().kv_slots == 24576 * 2**20 // (36 * 1024)
    with pytest.raises(ValueError, match=r"Ways out: .*learner\.activation_checkpointing=true"):
        plan("learner.activation_checkpointing=false")


def kept_by_the_tower(folder, depth, *, checkpointing):
    """Bytes of the distinct storages that encoding a clip keeps for the backward, parameters aside; and its patches."""
    backbone = Backbone.load(build_tiny(folder, TinySpec(vision_depth=depth)), LayoutConfig())
    backbone.freeze("none")
    if checkpointing:
        checkpoint_activations(backbone)
    backbone.model.train()
    own = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor):
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.encode_video([np.zeros((6, 2, 56, 56, 3), np.uint8)])
    return sum(kept.values()), 6 * 16


def test_a_checkpointed_tower_is_counted_by_the_inputs_of_its_blocks(tmp_path):
    more, patches = kept_by_the_tower(tmp_path / "five", 5, checkpointing=True)
    less, _ = kept_by_the_tower(tmp_path / "four", 4, checkpointing=True)
    assert more - less == patches * 64 * 4
    whole, _ = kept_by_the_tower(tmp_path / "whole", 5, checkpointing=False)
    part, _ = kept_by_the_tower(tmp_path / "part", 4, checkpointing=False)
    assert whole - part > 5 * (more - less)
    stream, learner = StreamSize(6, 4, 20, 10), LearnerConfig()
    said = []
    for folder in ("five", "four"):
        geometry = ModelGeometry.read(tmp_path / folder)
        again = replace(learner, activation_checkpointing=True)
        trained = 1000  # so that the backward, not the optimiser's step, is the peak
        with_tower, without = (
            learner_footprint(
                geometry, again, trained, stream, 1, tower_trains=trains, reference=False, flex=False, fused=False
            ).total
            for trains in (True, False)
        )
        said.append(with_tower - without)
    assert said[0] - said[1] == more - less


def test_every_demonstration_of_a_micro_batch_has_a_clip_to_encode():
    geometry = three_b()
    stream = StreamSize(20, 192, 43, 100)
    learner = LearnerConfig(dtype="bfloat16", micro_batch_tokens=4 * stream.tokens)

    def tower(streams, per_clip):
        both = [
            learner_footprint(
                *(geometry, learner, geometry.total, stream, streams),
                tower_trains=trains,
                reference=False,
                flex=True,
                fused=True,
                per_clip=per_clip,
            ).total
            for trains in (True, False)
        ]
        return both[0] - both[1]

    assert tower(4, 1) == 4 * tower(4, 4) == 2 * tower(4, 2)


EIGHTEEN_GIB = replace(H200, free=18 * GIB)


def test_an_evaluation_alone_stages_no_weights_and_makes_room_for_the_learner_that_scores_its_logs():
    config = smoke("job=eval", "learner.freeze=none")
    alone = plan_devices(config, {}, three_b(), TASKS, ([EIGHTEEN_GIB], [EIGHTEEN_GIB]))
    assert dict(alone.footprints[0].parts)["staged weights"] == 0
    # The float32 copies that DeepSpeed makes at once: 14 GiB.
    with pytest.raises(
        ValueError, match=r"learner [\d.]+ GiB \(weights [\d.]+ GiB \+ optimiser [\d.]+ GiB \+ scoring "
    ):
        plan_devices(config, {"eval": config.learner}, three_b(), TASKS, ([EIGHTEEN_GIB], [EIGHTEEN_GIB]))
    scored = plan_devices(config, {"eval": config.learner}, three_b(), TASKS, ([H200], [H200]))
    trained = plan_devices(config, {"rl": config.learner}, three_b(), TASKS, ([H200], [H200]))
    assert scored.footprints[-1].total < trained.footprints[-1].total / 1.5


@pytest.mark.parametrize(
    "override",
    [
        "learner.attention=flex",
        "rollout.attention=flashinfer",
        "rollout.attention=triton",
        "model.vision_attention=flash_attn",
    ],
)
def test_a_forced_kernel_that_the_device_rules_out_is_refused_before_anything_loads(override):
    host = DeviceInfo("n/host", "the host memory of n", False, 500 * GIB, 400 * GIB)
    with pytest.raises(ValueError, match=rf"{override} cannot run here: .*; use {override.partition('=')[0]}=auto"):
        planned(smoke(override), host)


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [((), True), (("rollout.cuda_graphs=off",), False), (("rollout.attention=torch",), False)],
)
def test_what_decode_graphs_keep_is_counted_where_there_are_some(overrides, kept):
    worker = planned(smoke(*overrides), H200).footprints[0]
    assert bool(dict(worker.parts)["decode graphs"]) == kept
    host = DeviceInfo("n/host", "the host memory of n", False, 500 * GIB, 400 * GIB)
    assert dict(planned(smoke(*overrides), host).footprints[0].parts)["decode graphs"] == 0


def test_a_checkpoint_without_safetensors_says_what_to_do(tmp_path):
    folder = build_tiny(tmp_path / "model", TinySpec(hidden=64, layers=1))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"can run code when they are loaded"):
        ModelGeometry.read(folder)


def test_a_tied_head_that_is_stored_all_the_same_is_counted_once(tmp_path):
    folder = build_tiny(tmp_path / "model", TinySpec(tie_embeddings=True))
    once = ModelGeometry.read(folder)
    weights = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight"))
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    assert ModelGeometry.read(folder).parameters == once.parameters

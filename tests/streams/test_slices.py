"""A clip through the vision tower in slices: the same rows, in the memory of one call, beside a thread that merges."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.planning.device_plan import plan_devices
from runtime.planning.footprint import tower_bytes, worker_footprint
from runtime.planning.stream_size import StreamSize
from streams.backbone import slices, tower
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.model_shape import ModelGeometry
from streams.layout.layout import LayoutConfig
from tests.support.held_bytes import HeldBytes
from tests.support.one_gpu import GIB, H200, TASKS, smoke, three_b
from tests.support.streams import MODEL_TYPES, loud_backbone, norms_in_input_dtype


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("backbone"), torch.float64, request.param)


def clip_of(backbone, chunks, times=1, height=3, width=5, seed=0):
    """A random clip; sides in video tokens: windows of the tower are cut."""
    side = backbone.image.patch_size * backbone.image.merge_size
    shape = (chunks, times * backbone.image.temporal_patch_size, height * side, width * side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def whole(backbone, clip, *, pre_merger):
    """The clip in one call of the tower."""
    visual = backbone.model.model.visual
    visual = tower.without_mergers(visual) if pre_merger else visual
    with torch.no_grad():
        return tower.encode(visual, backbone.image, [clip], backbone.dtype)[0]


# Patches of a chunk are 2 x 60.
@pytest.mark.parametrize(
    ("bound", "calls"),
    [(120, 7), (240, 4), (399, 3), (50, 7), (10**6, 1)],
    ids=["one chunk", "two, and one left over", "three, and one left over", "a chunk above the bound", "all"],
)
@pytest.mark.parametrize("pre_merger", [False, True], ids=["features", "pre-merger"])
def test_slices_make_the_rows_of_one_call(backbone, monkeypatch, bound, calls, pre_merger):
    monkeypatch.setattr(slices, "CPU_SLICE_PATCHES", bound)
    clip = clip_of(backbone, 7, times=2)
    wanted = whole(backbone, clip, pre_merger=pre_merger)
    assert wanted.abs().max() > 0.1
    encoding = backbone.encoding(clip, pre_merger=pre_merger)
    taken = []
    while not encoding.done:
        taken.append(encoding.advance())
    assert sum(taken) == 7 * 120
    assert len(taken) == calls
    assert max(taken) <= max(bound, 120)
    made = encoding.finish()
    assert not made.requires_grad
    assert made.dtype == torch.float64
    assert encoding.nbytes == made.nbytes
    torch.testing.assert_close(made, wanted, atol=1e-12, rtol=0)
    # The comparison sees a slice that is out of place.
    assert (made - wanted.roll(1, 0)).abs().max() > 0.1


def test_one_thread_may_merge_while_another_encodes_up_to_the_mergers(backbone, monkeypatch):
    """The tower of the encoding thread has no mergers, so the other one's are not touched."""
    monkeypatch.setattr(slices, "CPU_SLICE_PATCHES", 60)
    clip = clip_of(backbone, 3)
    rows = whole(backbone, clip, pre_merger=True)
    with torch.no_grad():
        wanted = backbone.merge([rows])[0]
    inside, go_on = threading.Event(), threading.Event()
    made = []

    def pause(*_):
        inside.set()
        assert go_on.wait(30)

    block = backbone.model.model.visual.blocks[-1]
    hook = block.register_forward_hook(pause)
    encoder = threading.Thread(target=lambda: made.append(backbone.encoding(clip, pre_merger=True).finish()))
    encoder.start()
    try:
        assert inside.wait(30)
        with torch.no_grad():
            merged = backbone.merge([rows])[0]
    finally:
        go_on.set()
        encoder.join(30)
        hook.remove()
    assert torch.equal(merged, wanted)
    torch.testing.assert_close(made[0], rows, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_memory_of_the_tower_is_bounded_by_the_estimate_and_does_not_grow_with_the_clip(
    tmp_path, monkeypatch, model_type, dtype
):
    # The estimate is for a GPU.
    monkeypatch.setattr(slices, "SLICE_PATCHES", 256)
    monkeypatch.setattr(slices, "CPU_SLICE_PATCHES", 256)
    spec = TinySpec(model_type=model_type, hidden=64, layers=2, mlp=128)
    backbone = Backbone.load(build_tiny(tmp_path, spec), LayoutConfig(), dtype=dtype)
    geometry = ModelGeometry.read(tmp_path)
    peaks = []
    for chunks in (4, 40):
        clip = clip_of(backbone, chunks, height=4, width=4)
        gc.collect()
        held = HeldBytes()
        held.ignore(backbone.model.parameters())
        held.ignore(backbone.model.buffers())
        with held:
            made = backbone.encoding(clip).finish()
        peaks.append(held.peak - made.nbytes)
        said = tower_bytes(geometry, StreamSize(chunks, 16, 20, 10), dtype.itemsize, "slice")
        assert 0.5 * said < peaks[-1] <= said
        del made
    assert peaks[1] < 1.02 * peaks[0]


def test_a_step_of_a_worker_needs_no_more_memory_for_a_video_of_two_hours():
    """The tower takes a clip in slices, and the rest sees what the memory holds: here a window of text, too."""
    geometry, memory = three_b(), ("memory=sink_window", "memory.text_window=20", "monitor.every=0")

    def parts(turns):
        config = smoke(f"data.max_turns={turns}", f"data.tail_chunks={turns}", *memory)
        stream = StreamSize.largest(config, (replace(TASKS[0], end=float(turns)),), geometry)
        found = dict(worker_footprint(geometry, "bfloat16", geometry.total, stream, config, 0, ahead=True).parts)
        return found["a step"], found["encoding ahead"]

    assert parts(7200) == parts(60)
    assert 0.1 * GIB < parts(60)[1] < 0.2 * GIB


@pytest.mark.parametrize(
    ("freeze", "cuda", "ahead"), [("tower+merger", True, True), ("none", True, False), ("tower+merger", False, False)]
)
def test_the_memory_of_encoding_comes_on_top_only_where_the_engine_steps_meanwhile(freeze, cuda, ahead):
    device = H200 if cuda else replace(H200, cuda=False)
    config = smoke(f"learner.freeze={freeze}", "rollout.attention=torch")
    plan = plan_devices(config, {"eval": config.learner}, three_b(), TASKS, ([device], [device]))
    (worker,) = (dict(f.parts) for f in plan.footprints if f.process == "rollout worker")
    assert (worker["encoding ahead"] > 0) is ahead

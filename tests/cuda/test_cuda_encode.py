"""On a GPU: clips encoded on a stream and thread of their own, while the engine's stream and its graphs are at work."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from rollout.clips import ClipFeatures
from rollout.decode.graphs import CudaCapture
from streams.backbone import slices
from streams.backbone.backbone import Backbone, to_array
from streams.backbone.boundary import Boundary
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec
from streams.layout.layout import LayoutConfig
from streams.messages import RolloutTask
from streams.support.meter import Meter
from streams.task import Plan
from streams.video.reader import Clip
from tests.support.tasks import clip_task

pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.timeout(300)]
CHUNKS, CLIPS, WAIT_S = 12, 24, 120.0
SPECS = {"qwen2_5_vl": TinySpec(), "qwen3_vl": QWEN3_SPEC}


@pytest.fixture(params=SPECS)
def backbone(request, tmp_path, monkeypatch):
    backbone = Backbone.load(build_tiny(tmp_path, SPECS[request.param]), LayoutConfig(), device="cuda")
    side = 8 * backbone.image.patch_size
    # Four chunks of 8 x 8 patches a slice.
    monkeypatch.setattr(slices, "SLICE_PATCHES", 4 * 64)
    backbone.clips = [
        Clip(
            np.random.default_rng(i).integers(0, 256, (CHUNKS, 2, side, side, 3), np.uint8),
            np.zeros((CHUNKS, 2)),
            backbone.image.patch_size,
        )
        for i in range(CLIPS)
    ]
    return backbone


def features_of(backbone, boundary, budget=2**20):
    return ClipFeatures(
        backbone, boundary, budget, lambda array: array, lambda array: array, Meter(), ahead=True, limit_s=WAIT_S
    )


def encoder(features, backbone, put):
    """A thread that encodes every clip and hands it on."""

    def encode():
        for i, clip in enumerate(backbone.clips):
            encoding = features.claim(RolloutTask(f"{i}", clip_task(f"{i}"), Plan(CHUNKS, 1.0), 1, 1.0), clip, None)
            while encoding.made is None:
                features.advance(encoding)
            put(i, encoding)

    return threading.Thread(target=encode, daemon=True)


@pytest.mark.parametrize("boundary", [Boundary.TOWER, Boundary.TOWER_MERGER])
def test_the_engines_stream_reads_whole_clips_and_keeps_their_memory_while_it_does(backbone, boundary):
    """Memory of clips is freed while the engine's stream, which is behind, has not read them yet."""
    plain = [backbone.encoding(clip.frames).finish() for clip in backbone.clips]
    torch.cuda.synchronize()
    features = features_of(backbone, boundary, budget=1)  # nothing is kept
    heavy = torch.randn(4096, 4096, device="cuda")
    done, change = {}, threading.Condition()

    def put(i, encoding):
        with change:
            done[i] = encoding
            change.notify_all()

    thread = encoder(features, backbone, put)
    thread.start()
    found = []
    for i in range(CLIPS):
        with change:
            assert change.wait_for(lambda i=i: i in done, WAIT_S)
            encoding = done.pop(i)
        for _ in range(8):
            heavy = torch.nn.functional.normalize(heavy @ heavy)
        made, shipped = features.embed(encoding.made), encoding.made.reference
        found.append(made.clone())
        features.leave(encoding)
        rows = torch.from_numpy(shipped).cuda()
        again = backbone.merge([rows])[0].detach() if boundary is Boundary.TOWER else rows
        torch.testing.assert_close(found[-1], again, atol=1e-5, rtol=1e-5)
        del made, encoding
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert features.clips_encoded == CLIPS
    for made, wanted in zip(found, plain, strict=True):
        torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


def test_steps_are_captured_and_replayed_while_clips_are_encoded(backbone):
    features = features_of(backbone, Boundary.TOWER_MERGER, budget=2**30)
    made = {}
    thread = encoder(features, backbone, made.__setitem__)
    capture = CudaCapture()
    count = torch.zeros(1, device="cuda")
    thread.start()
    replays = 0
    while thread.is_alive() or not replays:
        graph = capture(lambda: count.add_(torch.ones(64, device="cuda").sum()))
        for _ in range(20):
            graph()
        # What warms up before a capture runs once.
        replays += 21
    thread.join(WAIT_S)
    assert count.item() == 64 * replays
    for i, clip in enumerate(backbone.clips):
        wanted = to_array(backbone.encoding(clip.frames).finish())
        np.testing.assert_allclose(made[i].made.reference, wanted, atol=1e-4, rtol=1e-4)

"""Qwen3-VL through the real worker and learner: real clips, patches of 16 pixels, a tower that trains or is frozen.

`put` and `get` are the identity here: what an actor ships by reference comes back as the array itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.batching import TrainItem
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.setup import LearnerSetup
from streams.backbone.backbone import Backbone, to_tensor
from streams.backbone.boundary import Boundary
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC
from streams.data.dataset import load_tasks
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.log.record import Kind
from streams.messages import RolloutTask, ScriptedTurn, ScriptTask
from streams.task import Plan
from streams.video.config import VideoConfig
from tests.support.learner import GRPO, SFT, even
from tests.support.service import LAYOUT, open_service, worker_setup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 60.0
TURNS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = replace(QWEN3_SPEC, hidden=64, layers=3, mlp=128, head_dim=24, patch_size=16, tie_embeddings=True)
    return build_tiny(tmp_path_factory.mktemp("model"), spec, seed=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    made = generate(tmp_path_factory.mktemp("clips") / "data", SyntheticConfig(train_clips=2, heldout_per_mode=1))
    return load_tasks(made.train_jsonl, on_bad="raise").tasks


def opened(checkpoint, freeze):
    video = VideoConfig(frames_per_chunk=4, max_pixels=64 * 64)
    return open_service(worker_setup(checkpoint, video=video, boundary=Boundary(freeze)))


def learner_of(checkpoint, freeze, ranks):
    values = LearnerConfig(lr=2e-3, grad_clip=1e6, freeze=freeze)
    return LearnerEngine(LearnerSetup(str(checkpoint), LAYOUT, values, total_steps=10, seed=0), ranks)


def payload_of(future):
    summary, payload = future.result(timeout=WAIT_S)
    assert summary.failed is None, summary.failed
    return summary, payload


def sample(service, task, name):
    return payload_of(service.submit(RolloutTask(name, task, Plan(TURNS, 1.0), 3, 1.0)))


def test_a_trained_tower_learns_in_every_level_and_its_worker_follows(checkpoint, tasks, ranks):
    service, learner = opened(checkpoint, "none"), learner_of(checkpoint, "none", ranks)
    try:
        script = [ScriptedTurn("nothing", None)] * TURNS
        script[3] = ScriptedTurn("red", "red")
        scripted = payload_of(service.script(ScriptTask("0/s", tasks[0], Plan(TURNS, 1.0), tuple(script))))[1]
        before = {name: p.detach().clone() for name, p in learner.backbone.trainable().items()}
        learner.train(0, SFT, [TrainItem(scripted)])
        after = learner.backbone.trainable()
        still = [name for name, old in before.items() if ".visual." in name and torch.equal(old, after[name])]
        # A bias of the keys moves every score of a query alike: its gradient is rounding.
        assert not [name for name in still if "bias" not in name]
        assert any("deepstack_merger_list.1" in name for name in before)
        assert service.stage(learner.export_weights(), 0.0).result(timeout=WAIT_S).version == 1
        summary, payload = sample(service, tasks[0], "1/fresh")
    finally:
        service.close()
    assert (payload.media_kind, payload.media.dtype) == ("frames", np.uint8)
    assert {log.single_version for log in payload.logs} == {1}
    assert summary.monitor.tokens == summary.tokens > 0
    assert summary.monitor.max < 1e-4
    report = learner.score([payload])
    assert report.diff.tokens == summary.tokens
    assert report.diff.max < 1e-4
    trained = learner.train(1, GRPO, [even(payload, (1.5, -0.5, -1.0))])
    assert trained.metrics["age0_tokens"] == summary.tokens
    assert trained.metrics["age0_logp_diff_max"] < 1e-4


def test_features_of_a_frozen_tower_carry_every_level_and_lose_none_on_the_way(checkpoint, tasks, ranks):
    service = opened(checkpoint, "tower+merger")
    try:
        summary, payload = sample(service, tasks[1], "0/frozen")
        again, shipped = payload_of(
            service.submit(RolloutTask("0/again", tasks[1], Plan(TURNS, 1.0), 3, 1.0, features=payload.media))
        )
        width = service.backbone.feature_width
        encoded = service.stats().clips_encoded
    finally:
        service.close()
    assert payload.media_kind == "features"
    chunk = payload.logs[0].chunks[0]
    assert chunk.grid[0] == 2
    assert payload.media.shape == (TURNS, chunk.num_tokens, width)
    assert summary.feature_bytes == payload.media.nbytes == TURNS * chunk.num_tokens * 3 * 64 * 4
    assert encoded == 1, "given features are not encoded again"
    assert again.monitor.max < 1e-4
    assert torch.equal(to_tensor(shipped.media), to_tensor(payload.media))
    learner = learner_of(checkpoint, "tower+merger", ranks)
    assert learner.score([payload, shipped]).diff.max < 1e-4
    # A learner that forgot the levels would be found: the check can fail.
    without = payload.media.copy()
    without[..., 64:] = 0
    assert learner.score([replace(payload, media=without)]).diff.max > 1e-3


def test_the_written_stream_reads_as_timestamps_and_vision_blocks(checkpoint, tasks):
    service = opened(checkpoint, "tower+merger")
    try:
        log = sample(service, tasks[0], "0/text")[1].logs[0]
    finally:
        service.close()
    tokenizer = Backbone.load(checkpoint, LAYOUT).tokenizer
    pads = "<|video_pad|>" * 4
    for turn in (0, TURNS - 1):
        text = tokenizer.decode(log.ids[(log.turn == turn) & np.isin(log.kind, (Kind.SCAFFOLD, Kind.VIDEO))].tolist())
        blocks = [f"<{turn + t:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for t in (0.25, 0.75)]
        assert "<|im_start|>user\n" + "".join(blocks) in text
    assert log.header.position_convention.startswith("qwen3_vl:")

"""`learner.freeze=tower` through the real worker and learner, in float64: a clip is encoded once, its mergers train."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.batching import TrainItem
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.setup import LearnerSetup
from streams.backbone.backbone import to_array, to_tensor
from streams.backbone.boundary import Boundary
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import QWEN3_SPEC, TinySpec
from streams.data.dataset import load_tasks
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.messages import RolloutTask, ScriptedTurn, ScriptTask
from streams.scoring.logprobs import behaviour_differences
from streams.task import Plan
from tests.support.learner import GRPO, SFT, even
from tests.support.ranks import float64
from tests.support.service import LAYOUT, open_service, worker_setup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 60.0
TURNS = 6
BAR = 1e-10
ADVANTAGES = (1.5, -0.5, -1.0)
SPECS = {
    "qwen2_5_vl": TinySpec(hidden=64, layers=2, mlp=128),
    "qwen3_vl": replace(QWEN3_SPEC, hidden=64, layers=3, mlp=128, head_dim=24),
}


@pytest.fixture(scope="module", params=SPECS)
def checkpoint(request, tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"), SPECS[request.param], seed=2, gain=2.0, std=1.0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    made = generate(tmp_path_factory.mktemp("clips") / "data", SyntheticConfig(train_clips=2, heldout_per_mode=1))
    return load_tasks(made.train_jsonl, on_bad="raise").tasks


@pytest.fixture(autouse=True)
def double(ranks):
    with ExitStack() as stack:
        float64(stack)
        yield


@pytest.fixture
def service(checkpoint):
    service = open_service(worker_setup(checkpoint, boundary=Boundary.TOWER, kv_slots=8192))
    yield service
    service.close()


@pytest.fixture
def engine(checkpoint, ranks):
    def make(reference="", **values):
        given = {"lr": 1e-2, "grad_clip": 1e6, "freeze": "tower", "zero_stage": 0} | values
        learner = LearnerConfig(**given)
        setup = LearnerSetup(str(checkpoint), LAYOUT, learner, total_steps=10, seed=0, reference=str(reference))
        return LearnerEngine(setup, ranks)

    return make


def sample(service, task, name, turns=TURNS, **more):
    summary, payload = service.submit(RolloutTask(name, task, Plan(turns, 1.0), 3, 1.0, **more)).result(timeout=WAIT_S)
    assert summary.failed is None, summary.failed
    return summary, payload


def visual(backbone):
    return {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".visual." in n}


def features_of(backbone, payload):
    """What the backbone's mergers make of a payload's clip, once per log."""
    with torch.no_grad():
        merged = backbone.merge([to_tensor(payload.media)])[0]
    return [merged.flatten(0, 1)] * len(payload.logs)


def test_engine_and_learner_agree_before_and_after_the_mergers_train(service, engine, tasks):
    learner = engine()
    before, payload = sample(service, tasks[0], "0/a")
    chunk = payload.logs[0].chunks[0]
    assert payload.media_kind == "pre_merger"
    assert payload.media.shape == (TURNS, chunk.num_tokens, service.backbone.pre_merger_width)
    assert before.feature_bytes == payload.media.nbytes
    assert before.monitor.tokens == before.tokens
    assert before.monitor.max <= BAR
    assert learner.score([payload]).diff.max <= BAR

    old = visual(learner.backbone)
    trained = learner.train(0, GRPO, [even(payload, ADVANTAGES)])
    assert trained.metrics["age0_tokens"] == before.tokens
    assert trained.metrics["age0_logp_diff_max"] <= BAR
    moved = {name for name, value in visual(learner.backbone).items() if not torch.equal(value, old[name])}
    assert moved == {name for name in old if "merger" in name}
    update = learner.export_weights()
    assert {name for name in update.names if ".visual." in name} == moved
    assert service.stage(update, 0.0).result(timeout=WAIT_S).version == 1

    after, again = sample(service, tasks[0], "1/a")
    assert service.stats().clips_encoded == 1, "the tower's own output outlives a swap"
    assert again.media is payload.media
    assert {log.single_version for log in again.logs} == {1}
    assert {chunk.feature_version for log in again.logs for chunk in log.chunks} == {1}
    assert after.monitor.tokens == after.tokens
    assert after.monitor.max <= BAR
    report = learner.score([again])
    assert report.diff.tokens == after.tokens
    assert report.diff.max <= BAR
    # The check can fail: the old mergers are found, alone and with everything else that was old.
    with torch.no_grad():
        stale = engine().backbone.merge([to_tensor(payload.media)])[0]
    assert learner.score([replace(again, media_kind="features", media=to_array(stale))]).diff.max > 1000 * BAR
    assert learner.score([payload]).diff.max > 1000 * BAR


def test_a_group_keeps_the_features_it_began_with_and_the_next_one_has_new_ones(service, engine, tasks):
    learner = engine()
    first = sample(service, tasks[0], "0/first", turns=8)[1]
    learner.train(0, GRPO, [even(first, ADVANTAGES)])
    steps = service.engine.steps
    running = service.submit(RolloutTask("1/over", tasks[0], Plan(8, 1.0), 8, 1.0))
    give_up = time.monotonic() + WAIT_S
    while service.engine.steps < steps + 12:
        assert time.monotonic() < give_up, "the group never ran"
        time.sleep(0.001)
    service.stage(learner.export_weights(), 0.0).result(timeout=WAIT_S)
    assert not running.done()
    summary, over = running.result(timeout=WAIT_S)
    assert summary.versions == (0, 1)
    assert summary.monitor.tokens == 0, "no weights reproduce a stream that lived through a swap"
    assert {chunk.feature_version for log in over.logs for chunk in log.chunks} == {0}
    # What was sampled before the swap is exact under the weights, and the mergers, of version 0.
    original = engine().backbone
    found = behaviour_differences(original, list(over.logs), features_of(original, over))
    early = [d[log.version[log.sampled] == 0] for d, log in zip(found, over.logs, strict=True)]
    assert sum(map(len, early)) > 0
    assert np.abs(np.concatenate(early)).max() <= BAR
    after, following = sample(service, tasks[0], "2/after", turns=8)
    assert {chunk.feature_version for log in following.logs for chunk in log.chunks} == {1}
    assert after.monitor.max <= BAR
    assert service.stats().clips_encoded == 1
    sample(service, tasks[1], "2/other")
    assert service.stats().clips_encoded == 2


def test_rows_that_come_with_a_task_go_through_the_workers_own_mergers(service, engine, tasks):
    payload = sample(service, tasks[1], "0/a")[1]
    learner = engine()
    learner.train(0, GRPO, [even(payload, ADVANTAGES)])
    service.stage(learner.export_weights(), 0.0).result(timeout=WAIT_S)
    given, shipped = sample(service, tasks[1], "1/a", features=payload.media[..., ::-1].copy())
    assert shipped.media is given.features
    assert given.monitor.max <= BAR
    assert learner.score([shipped]).diff.max <= BAR
    assert learner.score([replace(shipped, media=payload.media)]).diff.max > 1000 * BAR
    assert service.stats().clips_encoded == 1


def test_the_reference_keeps_its_own_mergers(service, engine, checkpoint, tasks):
    items = [even(sample(service, tasks[0], "0/a")[1], ADVANTAGES)]
    # Only the mergers train: what sets policy and reference apart is in the features alone.
    learner = engine(reference=checkpoint, freeze_names=("model.language_model.*", "lm_head.*"))
    assert all("merger" in name for name in learner.backbone.trainable())
    kls = [learner.train(i, replace(GRPO, kl_coef=1e-3), items).metrics["kl"] for i in range(2)]
    assert abs(kls[0]) <= BAR
    assert kls[1] > 1e-6
    frames = [even(replace(items[0].payload, media_kind="frames"), ADVANTAGES)]
    with pytest.raises(ValueError, match=r"learner\.freeze=tower: the reference has no tower"):
        learner.train(2, replace(GRPO, kl_coef=1e-3), frames)


def test_demonstrations_ship_frames_and_their_mergers_train(service, engine, tasks):
    script = [ScriptedTurn("nothing", None)] * TURNS
    script[3] = ScriptedTurn("red", "red")
    summary, payload = service.script(ScriptTask("0/s", tasks[0], Plan(TURNS, 1.0), tuple(script))).result(
        timeout=WAIT_S
    )
    assert summary.failed is None
    assert payload.media_kind == "frames"
    rows = service.backbone.encoding(payload.media, pre_merger=True).finish()
    shown, kept = engine(), engine()
    shown.train(0, SFT, [TrainItem(payload)])
    kept.train(0, SFT, [TrainItem(replace(payload, media_kind="pre_merger", media=to_array(rows)))])
    largest = 0.0
    for name, p in shown.backbone.trainable().items():
        one, other = (e.deepspeed.optimizer.state[e.backbone.trainable()[name]]["exp_avg"] for e in (shown, kept))
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13), name
        largest = max(largest, float(one.abs().max())) if "merger" in name else largest
        assert p.requires_grad
    assert largest > 1e-6


def test_patterns_may_freeze_the_mergers_too(service, engine, tasks, tmp_path):
    learner = engine(freeze_names=("model.visual.*",))
    payload = sample(service, tasks[0], "0/a")[1]
    learner.train(0, GRPO, [even(payload, ADVANTAGES)])
    update = learner.export_weights()
    assert update.names
    assert not [name for name in update.names if ".visual." in name]
    service.stage(update, 0.0).result(timeout=WAIT_S)
    after, again = sample(service, tasks[0], "1/a")
    assert again.media_kind == "pre_merger"
    assert after.monitor.max <= BAR
    assert learner.score([again]).diff.max <= BAR
    # A resume must freeze the same names.
    learner.save(tmp_path, {}).result(WAIT_S)
    same = engine(freeze_names=("model.visual.*",))
    assert same.load(tmp_path) == 1
    assert same.score([again]).diff.max <= BAR
    with pytest.raises(
        ValueError, match=r"learner\.freeze_names=\['model\.visual\.\*'\] but this run has .*=\['lm_head"
    ):
        engine(freeze_names=("lm_head.*",)).load(tmp_path)

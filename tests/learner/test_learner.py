"""The learner's engine for real: DeepSpeed ZeRO-1 in this process, on logs that the rollout service made."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from learner.batching import TrainItem
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.publish import chunks, full_bytes
from learner.setup import LearnerSetup
from rollout.staging import StagedWeights
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.data.dataset import load_tasks
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.log.record import NEVER
from streams.memory import MemoryConfig
from streams.messages import RolloutTask, ScriptedTurn, ScriptTask
from streams.scoring.logprobs import behaviour_differences, score_rows
from streams.scoring.packing import pack
from streams.task import Plan
from tests.support.learner import GRPO, SFT, even
from tests.support.service import LAYOUT, open_service, worker_setup
from tests.support.streams import random_turns, request
from tests.support.streams import run as run_streams
from tests.support.weights import Payload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 60.0
TURNS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = TinySpec(hidden=64, layers=2, mlp=128)
    return build_tiny(tmp_path_factory.mktemp("model"), spec, seed=2)


@pytest.fixture(scope="module")
def service(tmp_path_factory, checkpoint):
    service = open_service(worker_setup(checkpoint, monitor_every=0))
    yield service
    service.close()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    made = generate(tmp_path_factory.mktemp("clips") / "data", SyntheticConfig(train_clips=3, heldout_per_mode=1))
    return load_tasks(made.train_jsonl, on_bad="raise").tasks


def payload_of(future):
    summary, payload = future.result(timeout=WAIT_S)
    assert summary.failed is None, summary.failed
    return payload


@pytest.fixture(scope="module")
def demonstrations(service, tasks):
    """Three of different lengths, each with its frames."""
    items = []
    for i, task in enumerate(tasks):
        script = [ScriptedTurn("nothing", None)] * (TURNS + i)
        script[2 + i] = ScriptedTurn("red", ("red", "green", "blue")[i])
        items.append(
            TrainItem(
                payload_of(service.script(ScriptTask(f"0/{task.id}", task, Plan(len(script), 1.0), tuple(script))))
            )
        )
    return items


def sample(service, task, name, streams, temperature=1.0):
    return payload_of(service.submit(RolloutTask(name, task, Plan(TURNS, 1.0), streams, temperature)))


@pytest.fixture(scope="module")
def groups(service, tasks):
    """Two sampled groups with features, and advantages as of a group with one good stream."""
    advantages = (1.5, -0.5, -1.0)
    return [even(sample(service, task, f"1/{task.id}", 3), advantages) for task in tasks[:2]]


@pytest.fixture
def engine(checkpoint, ranks):
    """Makes engines: `engine(lr=...)`."""

    def make(steps=10, reference="", version=0, **values):
        given = {"lr": 2e-3, "grad_clip": 1e6, "freeze": "none"} | values
        learner = LearnerConfig(**given)
        setup = LearnerSetup(
            str(checkpoint), LAYOUT, learner, total_steps=steps, seed=0, reference=str(reference), version=version
        )
        return LearnerEngine(setup, ranks)

    return make


def weights_of(engine):
    return {name: p.detach().clone() for name, p in engine.backbone.model.named_parameters()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---- steps ----


@pytest.mark.parametrize("settings", [{}, {"head_chunk": 5}, {"zero_stage": 3}])
def test_an_entropy_bonus_alone_raises_entropy_and_only_up_to_its_floor(engine, groups, settings):
    silent = [replace(item, advantages=tuple(np.zeros_like(a) for a in item.advantages)) for item in groups]
    bonus = replace(GRPO, entropy_coef=1.0)
    learner = engine(**settings)
    found = [learner.train(step, bonus, silent).metrics["entropy"] for step in range(4)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 1e-3
    low = engine(**settings)
    floored = [low.train(step, replace(bonus, entropy_floor=1e-6), silent).metrics for step in range(2)]
    assert floored[0]["grad_norm"] == 0
    assert floored[0]["entropy"] == floored[1]["entropy"]


def test_supervised_steps_lower_the_loss_on_a_fixed_batch(engine, demonstrations):
    learner = engine()
    reports = [learner.train(step, SFT, demonstrations) for step in range(8)]
    losses = [report.metrics["loss"] for report in reports]
    assert losses[-1] < 0.75 * losses[0]
    assert [report.version for report in reports] == list(range(1, 9))
    assert {report.metrics["target_tokens"] for report in reports} == {
        sum(int(log.target.sum()) for item in demonstrations for log in item.payload.logs)
    }


def first_gradient(learner):
    """The gradient of the engine's only step: the first moment after one step is (1 - beta1) of it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    scale = 1 - learner.config.betas[0]
    return {
        name: safe_get_full_optimizer_state(p, "exp_avg") / scale for name, p in learner.backbone.trainable().items()
    }


def cuts(items):
    """All in one row; a row each, all at once; a row each, one by one; two in a row, one row at a time."""
    two = 2 * max(len(log) for item in items for log in item.payload.logs)
    return [
        {"row_tokens": 10**5, "micro_batch_tokens": 10**6},
        {"row_tokens": 1, "micro_batch_tokens": 10**6},
        {"row_tokens": 1, "micro_batch_tokens": 1},
        {"row_tokens": two, "micro_batch_tokens": two, "head_chunk": 7},
    ]


@pytest.mark.parametrize("loss", [SFT, GRPO], ids=["sft", "grpo"])
def test_the_gradient_of_a_step_does_not_depend_on_the_micro_batch_cut(engine, demonstrations, groups, loss):
    items = demonstrations if loss is SFT else groups
    # Where a gradient vanishes in exact arithmetic, Adam's first step is rounding noise of size lr, hence a small one.
    learners = [engine(lr=1e-5, **cut) for cut in cuts(items)]
    reports = [learner.train(0, loss, items) for learner in learners]
    counts = [report.metrics["micro_batches"] for report in reports]
    streams = sum(len(item.payload.logs) for item in items)
    assert counts == [1, 1, streams, (streams + 1) // 2]
    wanted = first_gradient(learners[0])
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-3
    weights = learners[0].export_weights()
    for learner, report in zip(learners[1:], reports[1:], strict=True):
        assert report.metrics["loss"] == pytest.approx(reports[0].metrics["loss"], rel=1e-5, abs=1e-7)
        assert report.metrics["grad_norm"] == pytest.approx(reports[0].metrics["grad_norm"], rel=1e-5)
        assert largest_difference(wanted, first_gradient(learner)) < 1e-5 * largest
        exported = learner.export_weights()
        assert exported.names == weights.names
        np.testing.assert_allclose(exported.buffer.view(np.float32), weights.buffer.view(np.float32), atol=2.1e-5)


@pytest.mark.smoke
def test_a_group_sampled_at_the_learners_version_has_ratio_1_and_no_log_prob_difference(engine, groups):
    metrics = engine(freeze="tower+merger").train(0, GRPO, groups).metrics
    sampled = sum(int(log.sampled.sum()) for item in groups for log in item.payload.logs)
    assert metrics["age0_tokens"] == sampled == metrics["target_tokens"]
    assert 0 <= metrics["age0_logp_diff_max"] < 1e-4
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_share"] == 0
    assert metrics["grad_norm"] > 0


def test_a_rewarded_stream_becomes_more_likely_and_a_punished_one_less(engine, groups):
    learner = engine(lr=1e-3, freeze="tower+merger")
    learner.train(0, GRPO, groups)
    for item in groups:
        logs = list(item.payload.logs)
        features = torch.from_numpy(item.payload.media).flatten(0, 1)
        with torch.no_grad():
            change = [
                float(now.sum() - log.behaviour_logp[log.sampled].sum())
                for log, now in zip(logs, scores_of(learner.backbone, logs, features), strict=True)
            ]
        assert change[0] > 0 > change[2]


def test_the_gradient_of_a_step_is_each_tokens_own_advantage_times_its_log_probs_gradient(engine, checkpoint, groups):
    """Computed again without packing, engine or DeepSpeed: stream by stream, token by token."""
    rng = np.random.default_rng(3)
    items = [replace(item, advantages=tuple(rng.normal(size=len(a)) for a in item.advantages)) for item in groups]
    learner = engine(lr=1e-5, freeze="tower+merger", row_tokens=200, micro_batch_tokens=400)
    learner.train(0, GRPO, items)
    found = first_gradient(learner)

    def expected(shift):
        backbone = Backbone.load(checkpoint, LAYOUT)
        total = sum(len(a) for item in items for a in item.advantages)
        for item in items:
            features = torch.from_numpy(item.payload.media).flatten(0, 1)
            for log, advantages in zip(item.payload.logs, item.advantages, strict=True):
                logp = score_rows(backbone, pack([log], [[0]]), features, temperature=1.0).logp
                (-(torch.from_numpy(np.roll(advantages, shift)) * logp).sum() / total).backward()
        return {name: p.grad for name, p in backbone.model.named_parameters() if name in found}

    largest = max(float(g.abs().max()) for g in found.values())
    assert largest_difference(found, expected(0)) < 1e-3 * largest, "the ratio is 1 to about 1e-4"
    assert largest_difference(found, expected(1)) > 0.1 * largest, "one token off is another gradient"


def scores_of(backbone, logs, features):
    """Log-probs of the sampled tokens now."""
    found = behaviour_differences(backbone, logs, [features] * len(logs))
    return [log.behaviour_logp[log.sampled] + difference for log, difference in zip(logs, found, strict=True)]


def test_greedy_streams_are_refused_for_training_by_name_and_can_be_scored(engine, service, tasks, groups):
    greedy = sample(service, tasks[0], "eval/greedy", 2, temperature=0.0)
    learner = engine(freeze="tower+merger")
    before = weights_of(learner)
    with pytest.raises(ValueError, match=r"stream eval/greedy/0 was decoded greedily"):
        learner.train(0, GRPO, [*groups, even(greedy, (1.0, -1.0))])
    assert learner.version == 0
    assert largest_difference(before, weights_of(learner)) == 0
    report = learner.score([greedy])
    assert report.diff.tokens == sum(int(log.sampled.sum()) for log in greedy.logs) > 0
    assert report.diff.max < 1e-4
    assert sum(part.tokens for part in report.by_kind.values()) == report.diff.tokens


# ---- the reference ----


@pytest.mark.parametrize("freeze", ["none", "tower+merger"])
def test_the_kl_to_the_starting_checkpoint_begins_at_zero_and_holds_the_policy_back(engine, checkpoint, groups, freeze):
    free, held = (engine(lr=1e-3, freeze=freeze, reference=checkpoint) for _ in range(2))
    kls = {}
    for name, learner, kl_coef in (("free", free, 1e-9), ("held", held, 2.0)):
        reports = [learner.train(i, replace(GRPO, kl_coef=kl_coef), groups) for i in range(4)]
        kls[name] = [report.metrics["kl"] for report in reports]
    assert kls["free"][0] == pytest.approx(0, abs=1e-6)
    assert kls["free"][-1] > 1e-3
    assert 0 < kls["held"][-1] < 0.7 * kls["free"][-1]


def test_a_kl_without_a_reference_is_refused_by_its_key_and_none_is_measured_without_one(engine, groups):
    learner = engine(freeze="tower+merger")
    with pytest.raises(ValueError, match=r"algorithm\.kl_coef=0\.1 but the learner was set up without a reference"):
        learner.train(0, replace(GRPO, kl_coef=0.1), groups)
    assert "kl" not in learner.train(0, replace(GRPO, kl_coef=0.0), groups).metrics


def test_a_reference_with_another_vocabulary_is_refused_by_its_key(engine, tmp_path):
    other = build_tiny(tmp_path / "other", TinySpec(hidden=64, layers=2, mlp=128, vocab_rows=768))
    with pytest.raises(ValueError, match=r"algorithm\.reference=.*other: its vocabulary or ban list is not that of"):
        engine(reference=other)


def test_a_reference_that_would_see_with_another_tower_is_refused(engine, checkpoint, groups, tmp_path):
    """It is handed what the trained checkpoint's frozen vision makes of a clip; with its own tower the KL was another."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("visual.merger.mlp.2.bias"))
    save_file(tensors | {name: tensors[name] + 0.5}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"algorithm\.reference=.*other: its model\.visual\.merger\.mlp\.2\.bias is not"
    ):
        engine(freeze="tower+merger", reference=other)
    # Mergers that train are the reference's own, and with freeze=none so is the tower.
    engine(freeze="tower", reference=other)
    assert engine(reference=other).reference is not None


# ---- publication ----


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 400))
def test_parameters_are_gathered_in_order_in_chunks_below_the_limit(sizes, limit):
    parameters = {f"p{i}": torch.nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)}
    made = list(chunks(parameters, limit))
    assert [name for chunk in made for name in chunk] == list(parameters)
    for chunk in made:
        assert len(chunk) == 1 or sum(full_bytes(p) for p in chunk.values()) <= limit
    for chunk, following in itertools.pairwise(made):
        first = next(iter(following.values()))
        assert sum(full_bytes(p) for p in chunk.values()) + full_bytes(first) > limit, "no smaller than need be"


def test_exported_weights_staged_on_another_backbone_decode_the_same(engine, checkpoint, demonstrations):
    learner = engine()
    for step in range(2):
        learner.train(step, SFT, demonstrations)
    update = learner.export_weights()
    assert update.version == 2
    other = Backbone.load(checkpoint, LAYOUT)
    wanted = [
        request(
            learner.backbone, MemoryConfig("rcsm", 2), random_turns(learner.backbone, rng, 5), f"s{i}", temperature=0
        )
        for i, rng in enumerate(np.random.default_rng(seed) for seed in range(3))
    ]
    learner.backbone.model.eval()
    theirs = run_streams(learner.backbone, wanted)
    untouched = run_streams(other, wanted)
    staged = StagedWeights.stage(update, other)
    assert_logs_equal(run_streams(other, wanted), untouched)
    staged.apply(other)
    assert_logs_equal(run_streams(other, wanted), theirs)
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(theirs, untouched, strict=True))


def assert_logs_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-6)


@pytest.mark.smoke
def test_a_worker_that_swapped_samples_what_the_learner_scores(engine, service, checkpoint, tasks, groups):
    learner = engine(freeze="tower+merger")
    worker = open_service(service.setup, worker=1)
    try:
        learner.train(0, GRPO, groups)
        assert worker.stage(learner.export_weights(), 0.0).result(timeout=WAIT_S).version == 1
        fresh = sample(worker, tasks[0], "2/fresh", 3)
    finally:
        worker.close()
    assert {log.single_version for log in fresh.logs} == {1}
    report = learner.score([fresh])
    assert report.version == 1
    assert report.diff.max < 1e-4
    # Groups of the version before no longer agree: the check can fail.
    assert learner.score([item.payload for item in groups]).diff.max > 1e-3


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig("rcsm", 1, text_window=2),
        MemoryConfig("sink_window", 1, 1, sink_tokens=3, tail_tokens=4),
        MemoryConfig("text_memory"),
        MemoryConfig("visual_budget", video_tokens=8),
        MemoryConfig("random", seed=1, rate=0.2),
    ],
    ids=lambda memory: memory.name,
)
def test_what_a_worker_evicted_the_learner_replays_from_the_log_alone(engine, service, tasks, memory):
    payload = payload_of(
        service.submit(RolloutTask(f"3/{memory.name}", tasks[0], Plan(TURNS, 1.0), 3, 1.0, memory=memory))
    )
    assert {log.header.policy for log in payload.logs} == {memory.name}
    assert all(log.evicted_tokens for log in payload.logs)
    learner = engine()
    assert learner.score([payload]).diff.max < 1e-4
    kept = [replace(log, expiry=np.full_like(log.expiry, NEVER)) for log in payload.logs]
    assert learner.score([replace(payload, logs=tuple(kept))]).diff.max > 1e-3, "without the record they disagree"


def test_a_frozen_tower_is_neither_exported_nor_changed(engine, demonstrations):
    learner = engine(freeze="tower+merger")
    before = weights_of(learner)
    learner.train(0, SFT, demonstrations)
    after = weights_of(learner)
    update = learner.export_weights()
    assert not [name for name in update.names if ".visual." in name]
    assert set(update.names) == {name for name in before if ".visual." not in name}
    for name in before:
        moved = not torch.equal(before[name], after[name])
        if ".visual." in name:
            assert not moved, name
        elif name.endswith("proj.weight"):
            assert moved, name


def test_an_open_tower_is_trained_and_exported(engine, demonstrations):
    learner = engine(freeze="none")
    before = weights_of(learner)
    learner.train(0, SFT, demonstrations)
    after = weights_of(learner)
    assert set(learner.export_weights().names) == set(before)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("attn.qkv.weight"))


# ---- checkpoints ----


def test_a_loaded_checkpoint_goes_on_as_if_it_had_never_stopped(engine, demonstrations, tmp_path):
    schedule = {"schedule": "cosine", "warmup_steps": 2, "steps": 6}
    learner = engine(**schedule)
    for step in range(3):
        learner.train(step, SFT, demonstrations)
    learner.save(tmp_path, {"note": "here"}).result(60)
    saved = weights_of(learner)
    report = learner.train(3, SFT, demonstrations)
    resumed = engine(**schedule)
    resumed.load(tmp_path)
    assert largest_difference(saved, weights_of(resumed)) == 0
    again = resumed.train(3, SFT, demonstrations)
    assert again.metrics["lr"] == report.metrics["lr"]
    assert again.metrics["loss"] == report.metrics["loss"]
    assert largest_difference(weights_of(learner), weights_of(resumed)) == 0
    assert largest_difference(saved, weights_of(resumed)) > 1e-5


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_a_state_of_any_zero_stage_is_loaded_as_plain_values_and_one_that_would_run_code_is_not(
    engine, demonstrations, tmp_path, stage, dtype
):
    learner = engine(zero_stage=stage, dtype=dtype)
    learner.train(0, SFT, demonstrations)
    learner.save(tmp_path, {})
    states = sorted((tmp_path / "deepspeed" / "state").glob("*.pt"))
    resumed = engine(zero_stage=stage, dtype=dtype)
    resumed.load(tmp_path)
    assert largest_difference(weights_of(learner), weights_of(resumed)) == 0
    made = tmp_path / "made"
    for file in states:
        whole = file.read_bytes()
        torch.save({"module": {}, "more": Payload(made)}, file)
        with pytest.raises(ValueError, match=rf"{file} holds more than tensors .*could run code"):
            engine(zero_stage=stage, dtype=dtype).load(tmp_path)
        assert not made.exists()
        file.write_bytes(whole)


def test_weights_without_their_optimiser_state_stand_where_they_stood_in_the_schedule(engine, demonstrations):
    schedule = {"schedule": "cosine", "warmup_steps": 2, "steps": 6}
    learner = engine(**schedule)
    rates = [learner.train(step, SFT, demonstrations).metrics["lr"] for step in range(5)]
    later = engine(version=3, **schedule)
    assert [later.train(step, SFT, demonstrations).metrics["lr"] for step in (3, 4)] == rates[3:]


def test_the_exported_half_of_a_checkpoint_holds_the_same_weights(engine, demonstrations, tmp_path):
    learner = engine()
    learner.train(0, SFT, demonstrations)
    learner.save(tmp_path, {"note": "here"}).result(60)
    exported = Backbone.load(tmp_path / "hf", LAYOUT)
    assert (
        largest_difference(weights_of(learner), {name: p.detach() for name, p in exported.model.named_parameters()})
        == 0
    )
    # Saving must not disturb the model: it is trained and scored afterwards.
    assert learner.train(1, SFT, demonstrations).version == 2


def test_a_folder_without_deepspeed_state_is_refused_by_name(engine, tmp_path):
    with pytest.raises(FileNotFoundError, match="no DeepSpeed state there"):
        engine().load(tmp_path)

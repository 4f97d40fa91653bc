"""Several learner ranks against one: real processes, gloo, DeepSpeed ZeRO 0-3, mostly in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streams.backbone.backbone import Backbone
from streams.backbone.boundary import Boundary
from streams.checkpoint.families import QWEN2_5_VL
from tests.support.learner import even
from tests.support.ranks import LAYOUT, Call, Job, RankProcesses, checkpoint, groups, learner_values, run, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = ([3, 2, 4], [12, 1], [3])
"""Turns per group of three steps: even, very uneven, fewer groups than ranks."""
KL = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Plays jobs on one rank or two, in processes that all tests of this module share."""
    running = {}

    def get(job, world):
        if world not in running or any(process.poll() is not None for process in running[world].processes):
            running[world] = RankProcesses(tmp_path_factory.mktemp(f"ranks{world}"), world)
        return running[world].run(job)

    yield get
    for processes in running.values():
        processes.close()


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """By `learner.freeze`: other weights than the trained model's, so that the KL is not zero, but for what is frozen."""
    made = {}
    for freeze in Boundary:
        path = checkpoint(tmp_path_factory.mktemp("reference") / freeze, seed=3)
        other, own = (load_file(folder / "model.safetensors") for folder in (path, model))
        shared = [name for name in other if freeze.below(QWEN2_5_VL.parameter_name(name))]
        save_file(other | {name: own[name] for name in shared}, path / "model.safetensors", metadata={"format": "pt"})
        made[freeze] = path
    return made


@pytest.fixture(scope="module")
def batches(model):
    return {
        media: [groups(model, turns, media=media, seed=i) for i, turns in enumerate(STEPS)]
        for media in ("frames", "pre_merger", "features")
    }


def spoiled(items, advantages):
    """The items, of which the last has other advantages: with two ranks only one of them holds it."""
    return [*items[:-1], even(items[-1].payload, advantages)]


def job_of(model, reference, batches, loss, freeze, media, *, faults=False, **values):
    """Three steps, then moments, weights and scores. faults: before them, two steps that must be refused."""
    steps = batches[media]
    settings = {"kl_coef": KL} if loss == "grpo" else {}
    bad = [
        train(0, "grpo", spoiled(steps[0], (1.0,)), **settings),
        train(0, "grpo", spoiled(steps[0], (1.0, float("nan"))), **settings),
    ]
    good = [train(i, loss, items, **settings) for i, items in enumerate(steps)]
    calls = (*(bad if faults else ()), *good, Call("moments"), Call("weights"), Call("score", items=tuple(steps[1])))
    return Job(str(model), learner_values(freeze=freeze, **values), calls, str(reference[freeze]) if settings else "")


@pytest.fixture(scope="module")
def alone(model, reference, batches, play):
    """Replies of one rank at stage 0, by loss, freeze and what travels."""
    made = {}

    def get(*case):
        if case not in made:
            job = job_of(model, reference, batches, *case, zero_stage=0)
            made[case] = play(job, 1)[0]
        return made[case]

    return get


def values_of(update):
    return update.buffer.view(np.dtype(update.dtype))


# Every stage once, stage 3 with both losses and at every boundary, and where layers gather once more to compute again.
CASES = [
    (0, "sft", "none", "frames", False),
    (1, "grpo", "tower+merger", "features", False),
    (2, "sft", "none", "frames", False),
    (3, "grpo", "tower+merger", "features", False),
    (3, "sft", "none", "frames", False),
    (3, "grpo", "none", "frames", True),
    (1, "sft", "tower", "frames", False),
    (3, "grpo", "tower", "pre_merger", False),
    (3, "sft", "tower", "frames", True),
]


@pytest.mark.parametrize(("stage", "loss", "freeze", "media", "recompute"), CASES)
def test_two_ranks_are_one(model, reference, batches, alone, play, stage, loss, freeze, media, recompute):
    faults = loss == "grpo"
    values = {"zero_stage": stage, "ranks": 2, "activation_checkpointing": recompute}
    job = job_of(model, reference, batches, loss, freeze, media, faults=faults, **values)
    first, second = play(job, 2)
    if faults:
        assert_refused_alike(first[:2], second[:2])
        first, second = first[2:], second[2:]
    wanted = alone(loss, freeze, media)
    for found, other, expected in zip(first[:3], second[:3], wanted[:3], strict=True):
        assert found.keys() == other.keys() == expected.keys()
        assert ("kl" in found) == (loss == "grpo")
        for name in found.keys() - {"step_s", "micro_batches"}:
            # DeepSpeed sums norms in float32.
            tolerance = 1e-6 if name == "grad_norm" else 1e-10
            assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
            assert other[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    for name, moment in wanted[3].items():
        assert (first[3][name] - moment).abs().max() <= 1e-12, name
    assert max(float(moment.abs().max()) for moment in wanted[3].values()) > 1e-3
    update, expected = first[4], wanted[4]
    assert second[4] is None, "only rank 0 copies out"
    assert (update.version, update.names, update.shapes) == (3, expected.names, expected.shapes)
    assert update.dtype == "float64"
    assert np.abs(values_of(update) - values_of(expected)).max() <= 1e-12
    parts = {name.split(".")[2] for name in update.names if ".visual." in name}
    assert parts == {"none": {"patch_embed", "blocks", "merger"}, "tower": {"merger"}, "tower+merger": set()}[freeze]
    for report in (first[5], second[5]):
        assert report.diff.tokens == wanted[5].diff.tokens > 0
        assert report.diff.max == pytest.approx(wanted[5].diff.max, abs=1e-10)
        assert report.by_kind.keys() == wanted[5].by_kind.keys()
        assert report.diff.max > 1e-6, "the weights have moved since the streams were sampled"


def assert_refused_alike(first, second):
    assert first == second, "all ranks agree"
    wrong_count, not_finite = first
    assert wrong_count.startswith("ValueError: learner rank ")
    assert "2 streams but 1 advantages" in wrong_count
    assert not_finite.startswith("RuntimeError: step 0 was refused, the weights are those of version 0: loss nan")
    assert "in stream 0/2/1." in not_finite


def test_fused_kernels_train_alike_where_weights_are_gathered_layer_by_layer(model, play, tmp_path, monkeypatch):
    """Stage 3 on two ranks, and layers that compute again, against one rank with the modules of transformers."""
    calls = (train(0, "grpo", groups(model, [1, 1], media="features", streams=1)), Call("moments"))
    wanted = play(Job(str(model), learner_values(freeze="tower+merger"), calls, fused_kernels="off"), 1)[0]
    values = learner_values(freeze="tower+merger", zero_stage=3, ranks=2, activation_checkpointing=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for found in run(Job(str(model), values, calls, fused_kernels="triton"), 2, tmp_path):
        assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], abs=1e-10)
        for name, moment in wanted[1].items():
            assert (found[1][name] - moment).abs().max() <= 1e-12, name
    assert max(float(moment.abs().max()) for moment in wanted[1].values()) > 1e-3


def test_one_rank_also_refuses_what_is_not_finite(model, batches, play):
    items = batches["features"][0]
    for stage in (0, 3):
        values = learner_values(freeze="tower+merger", zero_stage=stage)
        calls = (Call("weights"), train(7, "grpo", spoiled(items, (1.0, float("inf")))), Call("weights"))
        before, refusal, after = play(Job(str(model), values, calls), 1)[0]
        assert refusal.startswith("RuntimeError: step 7 was refused, the weights are those of version 0")
        assert (before.version, after.version) == (0, 0)
        assert np.array_equal(before.buffer, after.buffer)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "stage", "loss", "offload"), [(1, 1, "sft", "none"), (2, 3, "grpo", "none"), (2, 2, "sft", "cpu")]
)
def test_a_resumed_run_goes_on_bit_for_bit(play, tmp_path, ranks, stage, loss, offload):
    """Float32, as it is run; with a schedule, so that its state matters too, and against a reference in RL."""
    tied = stage == 3
    model = checkpoint(tmp_path / "model", tie_embeddings=tied)
    settings = {"kl_coef": KL} if loss == "grpo" else {}
    steps = [train(i, loss, groups(model, [2 + i, 2], media="frames", seed=i), **settings) for i in range(5)]
    values = learner_values(ranks=ranks, zero_stage=stage, offload=offload, lr=1e-3, schedule="cosine", warmup_steps=2)
    first = Job(str(model), values, (), reference=str(model) if settings else "", float64=False)
    saved = Call("save", path=str(tmp_path / "saved"))
    load = replace(saved, what="load")
    whole = replace(first, calls=(*steps[:3], Call("weights"), saved, *steps[3:], Call("weights")))
    through = play(whole, ranks)
    # A resume starts from the exported weights, and still measures its distance from where RL began.
    resumed = replace(first, checkpoint=str(tmp_path / "saved" / "hf"), calls=(load, *steps[3:], Call("weights")))
    # In new processes: nothing but the checkpoint connects the two.
    again = run(resumed, ranks, tmp_path / "resumed")
    for before, after in zip(through, again, strict=True):
        assert after[0] == 3, "the version is restored"
        for one, other in zip(before[5:7], after[1:3], strict=True):
            assert {k: v for k, v in one.items() if k != "step_s"} == {k: v for k, v in other.items() if k != "step_s"}
            assert one.get("kl", 1.0) > 1e-4
    ended, ended_again = through[0][-1], again[0][-1]
    assert ended.version == ended_again.version == 5
    assert np.array_equal(ended.buffer, ended_again.buffer)
    at_save = through[0][3]
    assert not np.array_equal(at_save.buffer, ended.buffer)
    assert_exported(tmp_path / "saved" / "hf", at_save, tied)
    if ranks == 2:
        assert_a_missing_part_is_refused_by_both(play, replace(first, calls=(load,)), tmp_path)
    # Another partitioning is refused by every rank, and named.
    other = learner_values(ranks=ranks, zero_stage=0 if offload == "none" else 1, offload=offload)
    for (refusal,) in play(replace(first, learner=other, calls=(load,), reference=""), ranks):
        assert refusal.startswith("ValueError")
        assert f"learner.zero_stage={stage} but this run has learner.zero_stage={other.zero_stage}" in refusal


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (2, "cpu"), (3, "none")])
def test_what_is_written_while_training_goes_on_is_bit_for_bit_what_was_there(play, tmp_path, stage, offload):
    """The same step is saved before the next one, and copied, to be written after three more."""
    model = checkpoint(tmp_path / "model", tie_embeddings=stage == 1)
    values = learner_values(
        ranks=2, zero_stage=stage, offload=offload, lr=1e-3, freeze="tower" if stage > 1 else "none"
    )
    steps = [train(i, "sft", groups(model, [2 + i % 2, 2], media="frames", seed=i)) for i in range(5)]
    path = {name: str(tmp_path / name) for name in ("stopped", "beside", "later")}
    calls = (
        *(*steps[:2], Call("save", path=path["stopped"]), Call("copy", path=path["beside"])),
        *(*steps[2:], Call("write"), Call("copy", path=path["later"]), Call("write")),
    )
    replies = play(Job(str(model), values, calls, float64=False), 2)
    assert not [reply for rank in replies for reply in rank if isinstance(reply, str)], replies
    stopped, beside, later = (contents(tmp_path / name) for name in path)
    assert stopped.keys() == beside.keys() == later.keys()
    assert {name for name in stopped if stopped[name] != beside[name]} == set()
    changed = {name.split("/")[-1] for name in stopped if stopped[name] != later[name]}
    assert {"model.safetensors", "learner.json"} < changed, "what was trained meanwhile would have been seen"
    states = {name for name in changed if name.endswith("_states.pt")}
    assert len(states) == (1 if stage == 0 else 4 if stage == 3 else 3), states


def contents(folder):
    """The bytes of every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_a_missing_part_is_refused_by_both(play, job, folder):
    part = folder / "saved" / "deepspeed" / "rng_rank00001.pt"
    kept = part.read_bytes()
    part.unlink()
    ((refusal,), other) = play(job, 2)
    assert other == [refusal]
    assert refusal.startswith("FileNotFoundError: learner rank 1: ")
    assert "random state of rank 1 is missing" in refusal
    part.write_bytes(kept)


def assert_exported(path, update, tied):
    """`from_pretrained` loads what was published, with spare rows and tied weights as they were."""
    backbone = Backbone.load(path, LAYOUT)
    found = {name: p.detach() for name, p in backbone.model.named_parameters()}
    flat, at = torch.from_numpy(update.buffer.copy()).view(torch.float32), 0
    assert set(update.names) == set(found)
    for name, shape in zip(update.names, update.shapes, strict=True):
        size = int(np.prod(shape))
        assert torch.equal(found[name], flat[at : at + size].view(shape)), name
        at += size
    embedding, head = backbone.model.get_input_embeddings().weight, backbone.model.get_output_embeddings().weight
    assert embedding.shape[0] == 640
    assert (embedding is head) == tied
    assert (path / "streaming.json").is_file()


def test_random_states_are_those_of_the_moment_of_saving(tmp_path):
    from learner.state import random_states, restore_random_states

    torch.save(random_states(), tmp_path / "states.pt")
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), __import__("random").random())
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist(), __import__("random").random())


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_rank_that_waits_in_vain_says_who_waited_for_what_and_within_the_timeout(model, batches, tmp_path):
    values = learner_values(freeze="tower+merger", ranks=2, collective_timeout_s=8)
    late = Call("sleep", step=1, path="14")
    job = Job(str(model), values, (late, Call("score", items=tuple(batches["features"][0]))), timeout_s=8)
    first, _ = run(job, 2, tmp_path)
    assert first[-1].startswith("RuntimeError: learner rank 0 of 2 waited for the other ranks (to begin scoring)")
    assert "8 s (learner.collective_timeout_s)" in first[-1]

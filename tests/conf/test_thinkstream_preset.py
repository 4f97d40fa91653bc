"""The ThinkStream preset: every published figure, through Hydra, without weights; and lengths given in epochs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.age import AgeBound
from conf.training import optimiser_steps, warmup_steps
from rewards import Reward
from tests.support.configs import composed

PRESET = ["experiment=thinkstream_qwen2_5_vl_3b", "data.train=a.jsonl", "data.heldout=b.jsonl"]


@pytest.fixture(scope="module")
def config():
    return composed(*PRESET)


def test_backbone_memory_and_sampling(config):
    assert config.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert (config.memory.name, config.memory.window) == ("rcsm", 20)
    assert (config.layout.think_budget, config.layout.max_new_tokens) == (20, 30)
    assert config.rollout.temperature == 1.0


def test_data_and_chunks(config):
    data, video = config.data, config.data.video
    assert (data.format, data.tail_chunks, data.max_turns) == ("thinkstream", 3, 120)
    assert (video.chunk_seconds, video.max_chunks, video.frames_per_chunk) == (1.0, 120, 2)
    assert (video.min_pixels, video.max_pixels) == (128 * 28 * 28, 192 * 28 * 28)


def test_cold_start(config):
    sft, learner = config.sft, config.sft_learner(1000)
    assert (sft.steps, sft.epochs, sft.batch) == (0, 1.0, 64)
    assert (sft.balance_decisions, sft.decision_weight_clamp) == (True, 20.0)
    assert (sft.late_probability, sft.answer_weight, sft.pending_thought) == (0.0, 1.0, "")
    assert (learner.lr, learner.schedule, learner.warmup_steps) == (1e-5, "cosine", 30)
    assert (tuple(learner.betas), learner.weight_decay, learner.grad_clip) == ((0.9, 0.999), 0.0, 1.0)
    # As published: the tower is frozen, the merger trains.
    assert learner.freeze == "tower"


def test_rl(config):
    algorithm, learner = config.algorithm, config.rl_learner(500)
    assert (algorithm.steps, algorithm.epochs) == (0, 1.0)
    assert (algorithm.group_size, algorithm.groups_per_step) == (8, 8)
    assert (algorithm.kl_coef, algorithm.advantage) == (1e-3, "grpo")
    assert (learner.lr, learner.schedule, learner.warmup_steps, learner.freeze) == (2e-7, "cosine", 15, "none")
    # On-policy: no stream is older than the weights it trains.
    assert AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, config.weights.max_lag).bound == 0


def test_rewards(config):
    assert {name: params["weight"] for name, params in config.reward.terms.items()} == {
        "format": 0.2,
        "time": 0.2,
        "correctness": 0.4,
        "efficiency": 0.2,
    }
    assert config.reward.combine == "weighted_sum"
    Reward.from_config(config.reward)


def test_what_is_printed_at_start(config):
    notes = config.notes()
    assert "not causal" in notes[0]
    assert "max_chunks=120" in notes[0]
    assert len(notes) == 1 + len(config.deviations) > 8
    for word in ("top-k 50", "system_prompt", "think budget", "end of the video"):
        assert any(word in note for note in notes), word
    assert all(note.startswith("deviation: ") and "\n" not in note for note in notes[1:])
    assert composed().notes() == []


def test_constant_chunks_are_one_override_away():
    config = composed(*PRESET, "data.video.max_chunks=0")
    assert not [note for note in config.notes() if "causal" in note]


@pytest.mark.parametrize(
    ("steps", "epochs", "tasks", "batch", "expected"),
    [
        (40, 0.0, 7, 8, 40),
        (0, 1.0, 64, 64, 1),
        (0, 1.0, 65, 64, 2),
        (0, 1.0, 5, 64, 1),
        (0, 3.0, 100, 8, 38),
        (0, 0.5, 100, 8, 7),
        (0, 0.1, 30, 1, 3),
    ],
)
def test_epochs_become_steps(steps, epochs, tasks, batch, expected):
    assert optimiser_steps(steps, epochs, tasks, batch) == expected


@given(st.integers(1, 50), st.integers(1, 10_000), st.integers(1, 256))
def test_whole_epochs_pass_over_every_task_and_stop_within_one_batch(epochs, tasks, batch):
    steps = optimiser_steps(0, float(epochs), tasks, batch)
    assert epochs * tasks <= steps * batch < epochs * tasks + batch


def test_lengths_and_warm_up_of_the_stages():
    config = composed("sft.steps=0", "sft.epochs=2", "sft.batch=8", "algorithm.steps=25", "algorithm.epochs=0")
    assert (config.sft_steps(100), config.rl_steps(100)) == (25, 25)
    with pytest.raises(ValueError, match="0 usable tasks"):
        config.sft_steps(0)
    # Without a ratio, the learner's own warm-up stays.
    assert config.rl_learner(100) == config.learner
    assert config.sft_learner(100).warmup_steps == 5
    assert [warmup_steps(0.03, total) for total in (0, 1, 100, 101)] == [0, 1, 3, 4]

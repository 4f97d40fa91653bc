"""The presets of VST and StreamingVLM: their published figures, what they need of 80 GB GPUs by the shapes of a real 7B
model without its weights, and a small run of each through the command line.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from conf.age import AgeBound
from rewards import Reward
from runtime.planning.clip_cache import check_features
from runtime.planning.device_plan import plan_devices
from runtime.planning.footprint import slot_bytes
from runtime.planning.stream_size import StreamSize
from streams.backbone.tiny import build_config, build_tokenizer
from streams.backbone.tiny_spec import TinySpec
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.support.usage import DeviceInfo
from streams.task import ExpectedAnswer, Plan, StreamTask, TimedQuery
from tests.support.commands import launch
from tests.support.configs import composed
from tests.support.geometries import qwen2_5_vl
from tests.support.starting import check_memory_policy, describe

OWN_DATA = ("data.train=a.jsonl", "data.heldout=b.jsonl")
PRESETS = ("vst_7b", "streamingvlm_7b")
TOKEN = 28 * 28
GIB = 2**30

SEVEN_B = TinySpec(
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    mlp=18944,
    vision_depth=32,
    vision_hidden=1280,
    vision_heads=16,
    vision_mlp=3420,
    full_attention=(7, 15, 23, 31),
    vocab_rows=152064,
)


def preset(name, *overrides):
    return composed(f"experiment={name}", *OWN_DATA, *overrides)


@pytest.fixture(scope="module")
def vst():
    return preset("vst_7b")


@pytest.fixture(scope="module")
def streamingvlm():
    return preset("streamingvlm_7b")


@pytest.fixture(scope="module")
def seven_b():
    """The geometry of Qwen2.5-VL-7B, its parameters counted on modules without memory."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(SEVEN_B, build_tokenizer()))
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(parameters.values()) == 8_292_166_656
    return qwen2_5_vl(
        layers=28,
        hidden=3584,
        mlp=18944,
        heads=28,
        kv_heads=4,
        head_dim=128,
        vocab=152064,
        tied=False,
        parameters=parameters,
    )


# ---- figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_both_train_the_language_model_of_a_7b(name):
    config = preset(name)
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert config.model.dtype == config.learner.dtype == "bfloat16"
    assert config.sft_learner(100).freeze == config.rl_learner(100).freeze == "tower+merger"
    assert (config.sft.late_probability, config.sft.balance_decisions, config.sft.answer_weight) == (0.0, False, 1.0)
    assert (config.sft.epochs, config.sft_learner(1000).warmup_steps, config.sft_learner(1).schedule) == (
        1,
        30,
        "cosine",
    )
    check_memory_policy(config)
    Reward.from_config(config.reward)


def test_vst_watches_clips_of_about_5000_tokens_and_remembers_in_text(vst):
    data, video = vst.data, vst.data.video
    tokens = video.frames_per_chunk // 2 * (video.max_pixels // TOKEN)
    assert tokens == pytest.approx(5000, rel=0.01)
    assert video.frames_per_chunk / video.chunk_seconds == 2
    assert (video.min_pixels // TOKEN, video.max_pixels // TOKEN) == (100, 160)
    assert (video.max_chunks, data.max_turns, data.tail_chunks) == (5, 5, 0)
    assert vst.memory.name == "text_memory"
    assert (vst.layout.think_budget, vst.layout.max_new_tokens) == (960, 1000)


def test_vst_trains_as_published(vst):
    sft, learner, algorithm = vst.sft_learner(1000), vst.rl_learner(1000), vst.algorithm
    assert (vst.sft.batch, sft.lr, sft.weight_decay) == (128, 5e-6, 0.0)
    assert (learner.lr, learner.schedule, learner.warmup_steps) == (5e-7, "constant_with_warmup", 20)
    assert (tuple(learner.betas), learner.weight_decay, learner.grad_clip) == ((0.9, 0.999), 0.01, 1.0)
    assert (algorithm.epochs, algorithm.groups_per_step, algorithm.group_size) == (1, 256, 8)
    assert (algorithm.advantage, algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef) == ("mean", 0.2, 0.2, 0.01)
    assert (vst.rollout.temperature, vst.rollout.top_p, vst.rollout.top_k) == (1.0, 1.0, 0)
    assert vst.job.stages == ["data", "sft", "rl", "eval"]
    assert vst.reward.terms == {"correctness": {}}
    # On-policy: no stream is older than the weights it trains.
    assert AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, vst.weights.max_lag).bound == 0


def test_the_last_turn_of_vst_is_the_one_in_which_the_answer_is_due(vst):
    question = TimedQuery(90.0, "Which one?")
    task = StreamTask("a", "a.mp4", 0.0, 100.0, (question,), (ExpectedAnswer(90.0, "B", "choice"),))
    chunk = vst.data.video.chunk_seconds_of(task)
    assert (vst.data.plan_of(task), task.due_turns(chunk)) == (Plan(3, 31.0), 3)
    # 1,000 s: five clips of 200 s; nothing is cut off.
    long = replace(task, end=1000.0, queries=(replace(question, time=999.0),), answers=(ExpectedAnswer(999.0, "B"),))
    assert vst.data.plan_of(long) == Plan(5, 200.0)


def test_streamingvlm_streams_as_published(streamingvlm):
    config, video = streamingvlm, streamingvlm.data.video
    memory = config.memory
    assert (memory.name, memory.positions) == ("sink_window", "contiguous")
    assert (memory.window, memory.text_window, memory.sink_tokens, memory.tail_tokens) == (16, 16, 512, 512)
    assert (video.chunk_seconds, video.frames_per_chunk, video.max_chunks) == (1.0, 2, 0)
    assert (video.min_pixels // TOKEN, video.max_pixels // TOKEN) == (100, 768)
    assert (config.layout.max_new_tokens, config.layout.force_empty_thoughts) == (20, True)
    assert config.rollout.temperature == 0.9
    assert (config.sft.batch, config.sft_learner(1).lr, config.sft_learner(1).weight_decay) == (512, 1e-5, 0.0)
    assert config.job.stages == ["sft", "eval"], "it was published without RL"
    assert preset("streamingvlm_7b", "job=rl").job.stages == ["rl"]
    assert preset("streamingvlm_7b", "memory.positions=native").memory.positions == "native"


# ---- what is printed at start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "vst_7b",
            ("top-p 0.98", "paper says 0.001", "four on 64", "Time=s-e", "512 tokens", "\\boxed{}", "our own format"),
        ),
        (
            "streamingvlm_7b",
            ("none was published", "24 s", "12 s", "repetition penalty", "16 rounds", "our own format"),
        ),
    ],
)
def test_every_difference_is_said_in_a_line_of_its_own(name, words):
    notes = preset(name).notes()
    deviations = [note for note in notes if note.startswith("deviation: ")]
    assert len(deviations) == len(preset(name).deviations) > 9
    assert not any("\n" in note for note in notes)
    for word in words:
        assert sum(word in note for note in deviations) == 1, word
    assert ("not causal" in notes[0]) == (name == "vst_7b")


def test_the_batch_is_said_in_streams(vst):
    said = "\n".join(describe(vst))
    assert "rl: 256 groups x 8 = 2048 streams per step, 1 epochs, async; age bound (256 - 1) // 256 + 0 = 0" in said
    assert "memory: text_memory" in said


# ---- what it takes -----------------------------------------------------------------------------------------------


def planned(config, geometry, *, ranks=8):
    """On GPUs of 80 GB, one for each learner rank and worker."""
    question = TimedQuery(0.0, "What is happening?")
    task = StreamTask("a", "a.mp4", 0.0, 1000.0, (question,), (ExpectedAnswer(999.0, "red"),))
    places = [
        [DeviceInfo(f"{part}{i}", f"{part} {i}", True, 80 * GIB, 79 * GIB) for i in range(count)]
        for part, count in (("rank", ranks), ("worker", config.rollout.workers))
    ]
    stages = {"sft": config.sft_learner(1)} | ({"rl": config.rl_learner(1)} if "rl" in config.job.stages else {})
    return plan_devices(config, stages, geometry, (task,), (places[0], places[1]))


@pytest.mark.parametrize("name", PRESETS)
def test_it_fits_eight_learner_gpus_of_80_gb(seven_b, name):
    config = preset(name)
    plan = planned(config, seven_b)
    assert slot_bytes(seven_b, "bfloat16") == 28 * 2 * 4 * 128 * 2 == 56 * 1024
    turns = {"vst_7b": 5, "streamingvlm_7b": 60}[name]
    question = TimedQuery(0.0, "What is happening?")
    task = StreamTask("a", "a.mp4", 0.0, 1000.0, (question,), (ExpectedAnswer(999.0, "red"),))
    stream = StreamSize.largest(config, (task,), seven_b)
    assert (stream.turns, stream.video) == (turns, {"vst_7b": 31 * 160, "streamingvlm_7b": 768}[name])
    assert stream.tokens <= config.learner.row_tokens, "a stream fits a row"
    assert plan.kv_slots >= stream.live(config) * config.rollout.max_streams, "no stream waits for the pool"
    for stage in ("sft", "rl"):
        assert "such clips" in check_features(config, seven_b, stage, turns)
    with pytest.raises(ValueError, match=r"GiB too many\. Ways out: .*learner\.activation_checkpointing=true"):
        planned(preset(name, "learner.activation_checkpointing=false"), seven_b)


# ---- small runs --------------------------------------------------------------------------------------------------

SMALL = (
    "model=tiny",
    "model.tiny.hidden=64",
    "model.tiny.layers=2",
    "data.video.min_pixels=784",
    "data.video.max_pixels=3136",
    "layout.system_prompt=Watch.",
    "rollout.workers=1",
    "monitor.every=1",
    "learner.dtype=float32",
    "learner.ranks=1",
    "learner.row_tokens=1024",
    "learner.micro_batch_tokens=4096",
    "sft.epochs=0",
    "sft.steps=2",
    "sft.batch=3",
    "algorithm.epochs=0",
    "algorithm.steps=2",
    "algorithm.group_size=2",
    "algorithm.groups_per_step=2",
    "algorithm.groups_in_flight=2",
    "eval.conditions=false",
    "eval.transcripts=0",
    "tracking.enabled=false",
)
OF_EACH = {
    # Clips of 4 s, five to a stream, with room for the thoughts of four seconds.
    "vst_7b": (
        "data.video.chunk_seconds=2",
        "data.video.frames_per_chunk=4",
        "layout.think_budget=30",
        "layout.max_new_tokens=40",
    ),
    # RL, too, which the published system has not.
    "streamingvlm_7b": (
        "job.stages=[sft,rl,eval]",
        "data.max_turns=14",
        "memory.window=3",
        "memory.text_window=5",
        "memory.sink_tokens=4",
        "memory.tail_tokens=4",
    ),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips whose demonstrations think; and the same without thoughts."""
    made = generate(tmp_path_factory.mktemp("data") / "clips", SyntheticConfig(6, 1, 4, 0, max_turns=16))
    plain = {}
    for split, path in (("train", made.train_jsonl), ("heldout", made.heldout_jsonl)):
        rows = [json.loads(line) | {"thoughts": []} for line in path.read_text().splitlines()]
        plain[split] = path.with_name(f"{split}-plain.jsonl")
        plain[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    thinking = (f"data.train={made.train_jsonl}", f"data.heldout={made.heldout_jsonl}")
    return {"vst_7b": thinking, "streamingvlm_7b": tuple(f"data.{split}={path}" for split, path in plain.items())}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PRESETS)
def test_a_small_run_goes_through_every_stage(clips, tmp_path, name):
    done = launch(
        f"experiment={name}", f"run_root={tmp_path / 'out'}", *SMALL, *OF_EACH[name], *clips[name], limit_s=500
    )
    assert done.returncode == 0, done.stderr + done.stdout
    said = " ".join(done.stdout.split())
    for deviation in preset(name).deviations:
        assert f"deviation: {' '.join(deviation.split())}" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["learner_steps"] == 2
    assert summary["skipped_samples"] == 0, summary["skipped"]
    assert summary["logp_diff_tokens"] > 0
    assert summary["max_abs_logp_diff"] <= 1e-3
    steps = [json.loads(line) for line in (tmp_path / "out" / "stages" / "rl.steps.jsonl").read_text().splitlines()]
    assert sum(step["values"]["rollout/evicted_tokens"] for step in steps) > 0
    streaming = json.loads((tmp_path / "out" / "checkpoints" / "rl" / "final" / "hf" / "streaming.json").read_text())
    assert streaming["memory"]["name"] == preset(name).memory.name

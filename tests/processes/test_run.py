"""One small run through the command line: real Ray actors, a tiny model, and data with every kind of broken sample.

The run is made once and read by all tests of this file; a second one evaluates again into the same folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen

from evals.compare import mean
from evals.report import chosen, report
from runtime.store.checkpoint import read_state
from runtime.task_order import names_of
from streams.backbone.backbone import Backbone
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.layout.layout import STREAMING_TOKENS, LayoutConfig
from streams.positions.mrope import QWEN2_5_VL_CONVENTION
from tests.support.clips import write_clip
from tests.support.commands import Finished, launch
from tests.support.small_run import GROUPS, IN_FLIGHT, MAX_LAG, SEED, SETTINGS, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


TRAIN_CLIPS, HELDOUT_PER_MODE = 6, 2
BAD_VIDEOS = {
    "missing": "No such file",
    "truncated": "truncated or damaged",
    "zero": "empty (0 bytes)",
    "promising": "the row says the clip lasts until 6 s but the file holds ",
}
BAD_LINES = {"not JSON": r"not JSON", "late query": r"queries\[0\]\.time=99.* lies outside"}


def write_bad_videos(folder: Path) -> None:
    """All of BAD_VIDEOS but the missing one."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    for name, options in (("truncated", {}), ("promising", {"movflags": "faststart"})):
        path = folder / f"{name}.mp4"
        write_clip(path, frames, 10, options)
        whole = path.read_bytes()
        # Without its end a plain file has no index; with the index in front, the header still promises every frame.
        path.write_bytes(whole[: len(whole) // 2])
    (folder / "zero.mp4").touch()


def with_bad_rows(good: Path, split: str) -> dict[str, int]:
    """Append every kind of bad row to copies of `good`'s rows; returns the line numbers of the bad lines."""
    rows = good.read_text().splitlines()
    for name in BAD_VIDEOS:
        row = {
            "id": f"{split}-{name}",
            "video": f"{name}.mp4",
            "end": 6.0,
            "queries": [{"time": 1.25, "text": "What colour is the shape now?"}],
            "answers": [{"time": 1.25, "text": "red"}],
            "category": "now",
        }
        rows.insert(1, json.dumps(row))
    late = json.loads(rows[0]) | {"id": f"{split}-late-query"}
    late["queries"][0]["time"] = 99.0
    rows.insert(3, '{"id": "broken", "video": ')
    rows.append(json.dumps(late))
    (good.parent / f"{split}-mixed.jsonl").write_text("\n".join(rows) + "\n")
    return {"not JSON": 4, "late query": len(rows)}


@dataclass(frozen=True)
class Run:
    """The module's run and what its data held. expected: (source, pattern of the reason) of every bad sample."""

    root: Path
    settings: tuple[str, ...]
    done: Finished
    summary: dict
    expected: tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = root / "own"
    generate(data, SyntheticConfig(train_clips=TRAIN_CLIPS, heldout_per_mode=HELDOUT_PER_MODE, max_turns=14))
    write_bad_videos(data)
    expected = []
    for split in ("train", "heldout"):
        numbers = with_bad_rows(data / f"{split}.jsonl", split)
        mixed = data / f"{split}-mixed.jsonl"
        expected += [(f"{mixed}:{numbers[name]}", pattern) for name, pattern in BAD_LINES.items()]
        expected += [
            (f"task {split}-{name} ({data / name}.mp4)", re.escape(reason)) for name, reason in BAD_VIDEOS.items()
        ]
    settings = (
        *SETTINGS,
        f"run_root={root / 'out'}",
        f"data.train={data / 'train-mixed.jsonl'}",
        f"data.heldout={data / 'heldout-mixed.jsonl'}",
    )
    done = launch(*settings)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    summary = json.loads((root / "out" / "summary.json").read_text())
    return Run(root / "out", settings, done, summary, tuple(expected))


# ---- the summary ----

MEASURED = (
    "heldout_reward_sft",
    "heldout_reward_rl",
    "timing_reward_sft",
    "timing_reward_rl",
    "accuracy_now",
    "accuracy_recall",
    "accuracy_alert",
    "accuracy_sft",
    "accuracy_now_sft",
    "accuracy_recall_sft",
    "accuracy_alert_sft",
    "accuracy_recall_empty_thoughts",
    "accuracy_recall_recent_frames",
    "recall_chance",
)


@pytest.mark.parametrize("name", MEASURED)
def test_every_share_of_the_summary_is_measured_and_lies_between_0_and_1(run, name):
    assert isinstance(run.summary[name], float)
    assert 0 <= run.summary[name] <= 1


def test_the_summary_says_what_was_run(run):
    assert run.summary["seed"] == SEED
    assert run.summary["learner_steps"] == STEPS
    assert run.summary["wall_s"] > 1


def test_failed_held_out_streams_stay_in_the_denominator(run):
    assert run.summary["heldout_n"] == 3 * HELDOUT_PER_MODE + len(BAD_VIDEOS)
    assert run.summary["heldout_n_by_mode"] == {
        "now": HELDOUT_PER_MODE + len(BAD_VIDEOS),
        "recall": HELDOUT_PER_MODE,
        "alert": HELDOUT_PER_MODE,
    }
    best = 3 * HELDOUT_PER_MODE / run.summary["heldout_n"]
    assert run.summary["heldout_reward_rl"] <= best


def test_every_held_out_stream_is_kept_and_adds_up_to_the_summary(run):
    kept = {labelled.label: labelled.kept for labelled in chosen([run.root], None)}
    assert list(kept)[:2] == ["sft", "rl"]
    assert set(kept) == set(run.summary["evaluations"])
    for name, result in run.summary["evaluations"].items():
        streams = kept[name].streams
        assert (len(streams), sum(s.failed for s in streams)) == (result["streams"], result["failed_streams"])
        for metric in ("reward", "timing", "accuracy"):
            assert mean(streams, metric).value == pytest.approx(result[metric], abs=1e-12), (name, metric)
    made = report(chosen([run.root], None))
    assert made["comparisons"][0]["reward"]["value"] == pytest.approx(
        run.summary["heldout_reward_rl"] - run.summary["heldout_reward_sft"], abs=1e-12
    )


def test_a_scripted_oracle_earns_1_and_silence_0(run):
    assert run.summary["reward_scripted_oracle"] == 1.0
    assert run.summary["reward_always_silent"] == 0.0


def test_learner_and_engine_agree_on_held_out_log_probs(run):
    assert run.summary["logp_diff_tokens"] > 0
    assert 0 <= run.summary["max_abs_logp_diff"] <= 1e-3


def test_ages_stay_below_the_bound_and_new_weights_reach_the_workers(run):
    assert 0 <= run.summary["max_age"] <= (IN_FLIGHT - 1) // GROUPS + MAX_LAG
    # The last step trains at version 3 on groups no older than the bound: they cannot be of version 0.
    assert 2 <= run.summary["weight_versions_seen"] <= STEPS


def test_every_bad_sample_is_counted_and_named_with_its_reason(run):
    skipped = {sample["source"]: sample["reason"] for sample in run.summary["skipped"]}
    assert sorted(skipped) == sorted(source for source, _ in run.expected)
    for source, pattern in run.expected:
        assert re.search(pattern, skipped[source]), (source, skipped[source])
    assert run.summary["skipped_samples"] == len(run.summary["skipped"]) == len(run.expected)


def test_bad_samples_are_met_and_named_by_every_stage_that_reads_them(run):
    """The lines of a file when it is read; the videos of the training file by the cold start and again by RL."""
    for source, pattern in run.expected:
        if not source.startswith("task "):
            assert re.search(rf"data: skipped {re.escape(source)}: .*{pattern}", run.done.stdout), source
    for name, reason in BAD_VIDEOS.items():
        for said in (
            f"sft: skipped 0/train-{name}: ",
            f"rl: dropped group 0/train-{name}: ",
            f"failed heldout-{name}: ",
        ):
            assert re.search(re.escape(said) + ".*" + re.escape(reason), run.done.stdout), said


# ---- processes ----


def test_every_actor_is_a_process_of_its_own(run):
    line = re.search(r"actors ready after .* \(pids: (.*)\)", run.done.stdout).group(1)
    pids = {name: int(pid) for name, pid in (part.rsplit(" ", 1) for part in line.split(", "))}
    assert sorted(pids) == ["learner", "rollout worker 0", "rollout worker 1", "scorer"]
    assert len({*pids.values(), run.done.pid}) == 5


def test_nothing_is_said_on_the_error_channel_that_looks_like_a_failure(run):
    assert "Traceback" not in run.done.stderr + run.done.stdout
    assert "tracking to" not in run.done.stderr


# ---- checkpoints ----


def test_checkpoints_are_complete_and_nothing_half_written_is_left(run):
    folder = run.root / "checkpoints"
    assert sorted(path.name for path in (folder / "rl").iterdir()) == ["final", "step000002"]
    assert [path.name for path in folder.iterdir() if path.name not in ("rl", "sft")] == []
    assert sorted(path.name for path in (folder / "sft").iterdir()) == ["final", "step000002"]
    for path in (folder / "sft" / "final", folder / "rl" / "step000002", folder / "rl" / "final"):
        assert sorted(part.name for part in path.iterdir()) == ["deepspeed", "files.json", "hf", "state.json"]
        assert list((path / "deepspeed").rglob("*optim_states.pt"))
        for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
            assert (path / "hf" / name).stat().st_size > 0, name
    assert not [p for p in run.root.rglob("*") if p.name.endswith((".partial", ".replaced"))]


@pytest.mark.parametrize(("name", "steps"), [("step000002", 2), ("final", STEPS)])
def test_the_state_names_every_trained_group_once(run, name, steps):
    state = read_state(run.root / "checkpoints" / "rl" / name)
    assert (state.stage, state.version, state.step) == ("rl", steps, steps)
    consumed = names_of(state)
    assert len(consumed) == len(set(consumed)) == steps * GROUPS
    assert not [group for group in consumed if group.split("train-")[1] in BAD_VIDEOS]
    # An epoch holds six good clips: the first six groups are all of them, whatever bad rows stand between.
    first = consumed[:TRAIN_CLIPS]
    assert {group.split("/")[0] for group in first} == {"0"}


@pytest.fixture(scope="module")
def exported(run):
    return run.root / "checkpoints" / "rl" / "final" / "hf"


def test_the_export_loads_with_transformers_alone(exported):
    model = AutoModelForImageTextToText.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    # By name: the Auto class asks for torchvision in older releases of transformers.
    processor = qwen.Qwen2VLImageProcessorPil.from_pretrained(exported)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert processor.patch_size == 14
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for token in STREAMING_TOKENS:
        assert added.count(token) == 1
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all()


def test_loading_the_export_as_a_backbone_adds_no_token_and_changes_no_weight(exported):
    plain = AutoModelForImageTextToText.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    backbone = Backbone.load(exported, LayoutConfig())
    assert len(backbone.tokenizer) == len(tokenizer)
    assert backbone.model.get_input_embeddings().weight.shape == plain.get_input_embeddings().weight.shape
    theirs = plain.state_dict()
    ours = backbone.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_moved_the_language_model_and_rl_left_the_frozen_tower_alone(run, exported):
    """Between the cold start and the end of RL, whose learner freezes the tower; it trains only where rewards differ.

    What a pattern names stays as it was before the cold start, too.
    """
    start = AutoModelForImageTextToText.from_pretrained(run.root / "model").state_dict()
    cold = AutoModelForImageTextToText.from_pretrained(run.root / "checkpoints" / "sft" / "final" / "hf").state_dict()
    final = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    tower = [name for name in cold if ".visual." in name and ".merger." not in name]
    assert tower
    named = "model.visual.merger.ln_q.weight"
    assert torch.equal(start[named], final[named])
    assert all(torch.equal(cold[name], final[name]) for name in tower)
    assert not any(torch.equal(start[name], cold[name]) for name in cold if name.endswith("q_proj.weight"))


def test_what_a_clip_weighs_at_the_boundary_is_printed_at_the_start_of_each_stage(run):
    said = " ".join(run.done.stdout.split())
    assert "clips of sft travel as frames: a chunk of at most 6,272 pixels x 3 x 1 bytes" in said
    # 4 patches of the tiny tower's 64 numbers behind each of the 4 tokens.
    assert (
        "clips of rl travel as pre_merger (learner.freeze=tower): a chunk of at most 4 tokens x 256 x 4 bytes" in said
    )


def test_the_export_says_how_it_is_to_be_run(exported):
    streaming = json.loads((exported / "streaming.json").read_text())
    assert streaming["layout"]["system_prompt"] == "Watch, think, speak up."
    assert (streaming["layout"]["think_budget"], streaming["layout"]["max_new_tokens"]) == (6, 10)
    memory = streaming["memory"]
    assert (memory["name"], memory["window"], memory["text_window"]) == ("rcsm", 4, 0)
    assert (streaming["chunk_seconds"], streaming["frames_per_chunk"]) == (1.0, 2)
    assert (streaming["min_pixels"], streaming["max_pixels"]) == (784, 3136)
    assert streaming["position_convention"] == QWEN2_5_VL_CONVENTION
    assert tuple(streaming["banned"]) == Backbone.load(exported, LayoutConfig()).layout.banned


# ---- tracking ----


def test_the_tracking_database_holds_one_finished_run_with_a_reward_for_every_step(run):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sightline")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if r.data.params["job.name"] == "all"]
    assert len(runs) == 1
    tracked = runs[0]
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["seed"] == str(SEED)
    assert tracked.data.params["algorithm.groups_in_flight"] == str(IN_FLIGHT)
    history = client.get_metric_history(tracked.info.run_id, "reward/total")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    assert all(0 <= point.value <= 1 for point in history)
    losses = client.get_metric_history(tracked.info.run_id, "sft/loss")
    assert sorted(point.step for point in losses) == [1, 2, 3]

    stored = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id)}
    assert stored == {"summary.json", "usage.json", "rl.html", *(f"{name}.jsonl" for name in RESULTS)}


# ---- transcripts ----

RESULTS = ("sft", "rl", "empty_thoughts", "recent_frames")


@pytest.fixture(scope="module")
def transcripts(run):
    """Lines by result, read before the folder is evaluated again."""
    folder = run.root / "transcripts"
    assert sorted(p.name for p in folder.iterdir()) == sorted(["rl.html", *(f"{name}.jsonl" for name in RESULTS)])
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in RESULTS
    }


def test_transcripts_hold_every_result_of_the_same_streams_with_the_broken_ones_last(run, transcripts):
    tasks = [line["task"] for line in transcripts["rl"]]
    assert len(tasks) == run.summary["heldout_n"]
    assert [line["task"] for line in transcripts["sft"]] == tasks
    assert {line["category"] for line in transcripts["recent_frames"]} == {"recall"}
    failed = [line["task"] for line in transcripts["rl"] if line["failed"]]
    assert failed == tasks[-len(BAD_VIDEOS) :]
    assert sorted(failed) == sorted(f"heldout-{name}" for name in BAD_VIDEOS)


def test_transcripts_add_up_to_the_summary(run, transcripts):
    for name in ("sft", "rl"):
        found = run.summary["evaluations"][name]
        assert np.mean([line["reward"] for line in transcripts[name]]) == pytest.approx(found["reward"])
        right = [answer["correct"] for line in transcripts[name] for answer in line["answers"]]
        assert np.mean(right) == pytest.approx(found["accuracy"])
        assert found["failed_streams"] == len(BAD_VIDEOS)
    policies = {
        name: {line["policy"]["name"] for line in lines if line["policy"]} for name, lines in transcripts.items()
    }
    assert policies == {"sft": {"rcsm"}, "rl": {"rcsm"}, "empty_thoughts": {"rcsm"}, "recent_frames": {"recent_frames"}}
    empty = [turn for line in transcripts["empty_thoughts"] for turn in line["turns"]]
    assert {turn["thought"] for turn in empty} == {""}


def test_the_page_shows_all_results_and_the_frames_of_every_clip_that_can_be_read(run, transcripts):
    text = (run.root / "transcripts" / "rl.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["results"][0]["name"] == "rl"
    assert {result["name"] for result in data["results"]} == set(RESULTS)
    for stream in data["streams"]:
        broken = stream["task"].removeprefix("heldout-") in BAD_VIDEOS
        assert bool(stream["frames"]) != broken
        assert ("no frames" in stream["frames_note"]) == broken
    assert "transcripts: " in run.done.stdout


# ---- a second run into the same folder ----


@pytest.fixture(scope="module")
def again(run):
    """The summary after `job=eval` into the same folder; what lay there before is made unreadable first."""
    (run.root / "summary.json").write_text("left over")
    before = (run.root / "checkpoints" / "rl" / "final" / "state.json").stat().st_mtime_ns
    done = launch(*run.settings, "job=eval", "tracking.enabled=false")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (run.root / "checkpoints" / "rl" / "final" / "state.json").stat().st_mtime_ns == before
    return json.loads((run.root / "summary.json").read_text())


def test_evaluating_again_rewrites_the_summary_with_the_same_results(run, again):
    """Greedy decoding is deterministic; what training measured is read from its own stage's file."""
    noise = {"max_abs_logp_diff", "mean_abs_logp_diff", "k3_logp_diff", "logp_diff_by_kind"}
    free = noise | {"wall_s", "skipped", "skipped_samples"}
    assert again.keys() == run.summary.keys()
    for name in run.summary.keys() - free:
        assert again[name] == run.summary[name], name


def test_evaluating_again_writes_the_same_transcripts(run, transcripts, again):
    for name, lines in transcripts.items():
        text = (run.root / "transcripts" / f"{name}.jsonl").read_text()
        assert [json.loads(line) for line in text.splitlines()] == lines, name


def test_evaluating_again_still_names_every_bad_sample_of_the_run(run, again):
    assert again["skipped"] == run.summary["skipped"]

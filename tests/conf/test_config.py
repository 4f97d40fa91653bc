"""The configuration: every preset validates, and everything impossible is refused by key before any actor starts."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from hydra.errors import HydraException

from conf.schema import RunConfig
from runtime.starting_point import StartingPoint
from streams.backbone.tiny_spec import QWEN3_SPEC
from streams.checkpoint.folder import resolve_checkpoint
from tests.support.configs import composed
from tests.support.project import ROOT
from tests.support.starting import check_inputs

CONF = ROOT / "conf"
OWN_DATA = ["data=jsonl", "data.train=a.jsonl", "data.heldout=b.jsonl"]


@pytest.mark.smoke
def test_one_job_alone_can_be_run_from_any_preset():
    assert composed("experiment=gpu_smoke").job.stages == ["data", "rl"]
    for experiment in ("quickstart", "gpu_smoke", "none"):
        assert composed(f"experiment={experiment}", "job=data").job.stages == ["data"]


@pytest.mark.smoke
def test_a_command_line_is_answered_and_a_run_driven_without_torch():
    """Loading torch and transformers takes several seconds: a typo must not cost them, and a driver needs neither."""
    code = (
        "import launch, sys; import conf.schema; conf.schema.register_schema(); launch._stages(); "
        "import runtime.run, runtime.placing.preflight, sft.loop, rl.loop, evals.job; "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def options() -> list[str]:
    """GROUP=OPTION for every file of every group."""
    return sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize("option", options())
def test_every_option_of_every_group_validates(option):
    presets = [f"experiment={name}" for name in ("thinkstream_qwen2_5_vl_3b", "vst_7b", "streamingvlm_7b")]
    own_data = ("data=jsonl", "data=thinkstream", *presets)
    extra = OWN_DATA[1:] if option in own_data else []
    assert isinstance(composed(option, "run_root=/shared/run", *extra), RunConfig)


@pytest.mark.smoke
def test_the_quickstart_pins_what_its_figures_rest_on():
    config = composed()
    assert (config.memory.name, config.memory.window) == ("rcsm", 4)
    assert config.algorithm.steps >= 40
    assert config.data.synthetic.train_clips >= 200
    assert config.data.synthetic.heldout_per_mode >= 96
    assert config.reward.terms == {
        "correctness": {},
        "timing": {"slack": 0, "late_slope": 0.25, "early_slope": 1.0},
    }
    assert config.reward.combine == "product"
    assert (config.sft.late_probability, config.sft.late_min, config.sft.late_max) == (0.7, 1, 4)


def test_the_quickstart_takes_the_tiny_qwen3_vl_unchanged():
    config = composed("model=tiny_qwen3_vl")
    assert config.model.tiny == dataclasses.replace(QWEN3_SPEC, layers=4)
    # Frames of at most 2 x 2 video tokens, as for the default backbone.
    assert config.data.video.max_pixels == (2 * config.model.tiny.token_side) ** 2
    assert composed().model.tiny.token_side == config.model.tiny.token_side


def test_one_seed_rules_the_clips_too():
    assert composed("seed=7").data.synthetic.seed == 7


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["+foo=1"], "foo"),
        (["+rollout.foo=1"], r"rollout\.foo"),
        (["memory.window=0"], r"memory\.window=0"),
        (["memory.window=wide"], r"memory\.window"),
        (["memory.text_window=-1"], r"memory\.text_window=-1"),
        (["memory=sink_window", "memory.text_window=0"], r"memory\.text_window=0"),
        (["memory=visual_budget", "memory.video_tokens=0"], r"memory\.video_tokens=0"),
        (["memory.name=custom", "memory.target=no_such:Policy"], r"memory\.target='no_such:Policy' cannot be loaded"),
        (["algorithm.group_size=1"], r"algorithm\.group_size=1"),
        (["rollout.top_p=0.9"], r"rollout\.top_p=0\.9"),
        (["rollout.top_k=50"], r"rollout\.top_k=50"),
        (["rollout.temperature=0"], r"rollout\.temperature=0"),
        (["data.synthetic.window=2"], r"data\.synthetic\.window=2"),
        (["+sft.learner.speed=2"], r"sft\.learner\.speed"),
        (["learner.freeze=half"], r"learner\.freeze='half' is not one of none, tower, tower\+merger"),
        (["learner.freeze_names=['']"], r"learner\.freeze_names=\[''\]"),
        (["+sft.learner.freeze_names=lm_head*"], r"sft\.learner\.freeze_names='lm_head\*' must be a tuple"),
        (["learner.zero_stage=4"], r"learner\.zero_stage=4"),
        (["learner.ranks=0"], r"learner\.ranks=0"),
        (["learner.offload=disk"], r"learner\.offload='disk'"),
        (["learner.zero_stage=0", "learner.offload=cpu"], r"learner\.zero_stage=0 with learner\.offload=cpu"),
        (["learner.zero_stage=0", "learner.dtype=bfloat16"], r"learner\.zero_stage=0 .*bfloat16"),
        (["learner.collective_timeout_s=0"], r"learner\.collective_timeout_s=0"),
        (["+sft.learner.ranks=2"], r"sft\.learner\.ranks=2 differs from learner\.ranks=1"),
        (["algorithm.kl_coef=-1"], r"algorithm\.kl_coef=-1"),
        (["algorithm.reference=''"], r"algorithm\.reference is empty"),
        (["sft.late_min=5"], r"sft\.late_min=5"),
        (["sft.pending_thought='{who}'"], r"sft\.pending_thought"),
        (["reward.terms.timing.slack=-1"], r"reward\.terms\.timing\.slack"),
        (["+reward.terms.nope={}"], r"reward\.terms\.nope"),
        (["cluster.address=auto", "run_root=relative"], r"run_root=relative"),
        (["model.tiny.model_type=qwen3"], r"model\.tiny\.model_type='qwen3'"),
        (["model.tiny.deepstack=[0]"], r"model\.tiny\.deepstack=\[0\]"),
        (["cluster=ray_address"], r"run_root=outputs/quickstart"),
        (["cluster.address='ray://head:10001'"], r"cluster\.address=ray://head:10001: .*ray job submit"),
        (["cluster.address='http://head:8265'"], r"cluster\.address=http://head:8265: .*ray job submit"),
        (["cluster.address=head", "run_root=/shared/run"], r"cluster\.address='head' is neither auto nor HOST:PORT"),
        (["cluster=ray_address", "cluster.num_cpus=4", "run_root=/shared/run"], r"cluster\.num_cpus=4"),
        (["data.train=only.jsonl"], r"data\.train and data\.heldout"),
        (["run_root=''"], "run_root"),
        (["resume=''"], "resume is empty"),
        (["deterministic=true"], r"deterministic=true needs algorithm\.mode=sync"),
        (["algorithm.mode=later"], r"algorithm\.mode='later'"),
        (["checkpoint.keep=0"], r"checkpoint\.keep=0"),
        (["checkpoint.optimizer=some"], r"checkpoint\.optimizer='some'"),
        (["checkpoint.requeue_status=0"], r"checkpoint\.requeue_status=0"),
        (["eval.every=-1"], r"eval\.every=-1"),
        (["eval.best=loss"], r"eval\.best='loss'"),
        (["job.stages=[watch,rl]"], "watch runs alone"),
        (["data.format=csv"], r"data\.format='csv' is not one of auto, sightline, thinkstream"),
        (["data.video.max_chunks=-1"], r"data\.video\.max_chunks=-1"),
        (["sft.epochs=1"], r"sft\.steps=200 and sft\.epochs=1\.0: exactly one"),
        (["sft.steps=0"], r"sft\.steps=0 and sft\.epochs=0\.0: exactly one"),
        (["algorithm.steps=0"], r"algorithm\.steps=0 and algorithm\.epochs=0\.0: exactly one"),
        (["algorithm.steps=-1", "algorithm.epochs=1"], r"algorithm\.steps=-1 .* must not be negative"),
        (["algorithm.steps=0", "algorithm.epochs=inf"], r"algorithm\.epochs=inf"),
        (["sft.warmup_ratio=1.5"], r"sft\.warmup_ratio=1\.5"),
        (["algorithm.warmup_ratio=-1"], r"algorithm\.warmup_ratio=-1"),
        (["algorithm.kl_coef=-0.1"], r"algorithm\.kl_coef=-0\.1"),
        (["algorithm.groups_per_step=0"], r"algorithm\.groups_per_step=0"),
        (["algorithm.groups_in_flight=-1"], r"algorithm\.groups_in_flight=-1"),
        (["weights.max_lag=-1"], r"weights\.max_lag=-1"),
        (["model.tiny.layers=0"], r"model\.tiny\.layers=0"),
        (["model.tiny.heads=3"], r"model\.tiny\.heads=3"),
        (["learner.betas=[0.9,2]"], r"learner\.betas=\[0\.9, 2"),
        (["learner.weight_decay=-1"], r"learner\.weight_decay=-1"),
        (["++sft.learner.lr=fast"], r"sft\.learner\.lr='fast' must be a float"),
        (["watch.query=now", "watch.at=3", "watch.seconds=2"], r"watch\.at=3 with watch\.seconds=2"),
    ],
)
def test_what_is_impossible_is_refused_by_key(overrides, key):
    with pytest.raises((ValueError, HydraException), match=key):
        composed(*overrides)


NUMBERS = (
    *("model.tiny.rope_theta", "data.video.chunk_seconds", "rollout.temperature", "rollout.group_deadline_s"),
    *("learner.lr", "learner.weight_decay", "learner.grad_clip", "learner.collective_timeout_s", "sft.epochs"),
    *("sft.decision_weight_clamp", "sft.answer_weight", "algorithm.clip_low", "algorithm.clip_high"),
    *(
        "algorithm.kl_coef",
        "monitor.max",
        "monitor.mean",
        "monitor.k3",
        "eval.transcript_mb",
        "checkpoint.grace_s",
        "checkpoint.deadline_s",
    ),
    *(
        "cluster.actor_cpus",
        "cluster.start_timeout_s",
        "cluster.call_timeout_s",
        "cluster.hang_s",
        "cluster.wait_s",
        "watch.at",
        "watch.seconds",
    ),
)


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_nan_infinite_or_negative(key, value):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        composed(f"{key}={value}")


@pytest.mark.parametrize("data", ["jsonl", "thinkstream"])
def test_own_data_without_files_do_not_fall_back_to_generated_ones(data):
    with pytest.raises(FileNotFoundError, match=r"data\.train: TRAIN\.jsonl does not exist \(set data\.train"):
        check_inputs(composed(f"data={data}"))


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match=r"model\.path=/nonexistent/model: no such folder, and not a hub id"):
        check_inputs(composed("model.path=/nonexistent/model"))


@pytest.mark.parametrize("name", ["nobody/nothing", "no body/x", "nobody/.."])
def test_a_hub_id_that_cannot_be_had_is_named_with_its_key(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = rf"algorithm\.init={re.escape(name)}: no such folder, and the hub gives no model of that name: \S.*name a folder"
    with pytest.raises(FileNotFoundError, match=said):
        resolve_checkpoint(name, "algorithm.init")


@pytest.mark.parametrize("key", ["eval.checkpoint", "algorithm.init", "model.path"])
def test_a_checkpoint_is_named_by_its_export_which_knows_how_it_is_run(tmp_path, key):
    """The folder above has no streaming.json: it would be run under the configuration's memory, and fail minutes later."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{re.escape(key)}=\S+ is a whole checkpoint: name its export, \S+/hf$"):
        check_inputs(composed(f"{key}={tmp_path}"))


def test_a_run_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"run_root=.*/run is a file"):
        check_inputs(composed(f"run_root={tmp_path / 'run'}"))


def test_a_submitted_job_uses_the_cluster_that_runs_it(monkeypatch):
    """Ray sets this variable for what `ray job submit` starts."""
    assert composed().cluster.existing == ""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert composed("run_root=/shared/run").cluster.existing == "auto"
    assert composed("run_root=/shared/run", "cluster.address=head:6379").cluster.existing == "head:6379"
    with pytest.raises(ValueError, match=r"run_root=relative: .*ray job submit"):
        composed("run_root=relative")


def test_groups_in_flight_below_one_step_are_refused_in_preflight():
    with pytest.raises(ValueError, match=r"algorithm\.groups_in_flight=3"):
        check_inputs(composed("algorithm.groups_in_flight=3"))


def test_a_run_may_not_start_from_what_it_replaces(tmp_path):
    start = tmp_path / "checkpoints" / "rl" / "final" / "hf"
    start.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    row = '{"id":"a","video":"a.mp4","end":9,"queries":[{"time":1,"text":"q"}],"answers":[{"time":2,"text":"a"}]}\n'
    (tmp_path / "data" / "train.jsonl").write_text(row)
    config = composed("job=rl", f"run_root={tmp_path}", f"algorithm.init={start}")
    with pytest.raises(ValueError, match=r"algorithm\.init=.*replaces"):
        StartingPoint.of(config).check_nothing_needed_is_replaced({})
    assert start.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm.group_size=1"], "algorithm.group_size=1"),
        (["job=eval"], "data.heldout"),
    ],
)
def test_the_command_line_stops_with_the_key_named_and_no_traceback(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "launch.py", f"run_root={tmp_path}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "actors ready" not in done.stdout


@pytest.mark.slow
def test_help_lists_jobs_and_experiments():
    done = subprocess.run(
        [sys.executable, "launch.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    for word in (
        "job=all",
        "job=sft",
        "job=watch",
        "resume=auto",
        "experiment=quickstart",
        "run_root=DIR",
        "memory: full",
    ):
        assert word in done.stdout


def test_a_doctor_checks_the_stages_of_the_whole_job_or_those_that_are_named():
    assert composed("job=doctor").job.stages == composed().job.stages
    assert composed("job=doctor").job.check_only
    assert not composed().job.check_only
    assert composed("experiment=vst_7b", "job.check_only=true").job.stages == composed("experiment=vst_7b").job.stages
    with pytest.raises(ValueError, match=r"job\.check_only=true with job\.stages=\['watch'\]"):
        composed("job=watch", "job.check_only=true")

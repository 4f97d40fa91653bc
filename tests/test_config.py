"""The configuration: every preset validates, and everything impossible is refused by key before any actor starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

import launch
from conf.schema import RunConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
OWN_DATA = ["data=jsonl", "data.train=a.jsonl", "data.heldout=b.jsonl"]


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_config(compose("config", overrides=list(overrides)))


def options() -> list[str]:
    """GROUP=OPTION for every file of every group."""
    return sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize("option", options())
def test_every_option_of_every_group_validates(option):
    extra = OWN_DATA[1:] if option == "data=jsonl" else []
    assert isinstance(composed(option, "run_root=/shared/run", *extra), RunConfig)


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


def test_one_seed_rules_the_clips_too():
    assert composed("seed=7").data.synthetic.seed == 7


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["+foo=1"], "foo"),
        (["+rollout.foo=1"], r"rollout\.foo"),
        (["memory.window=0"], r"memory\.window=0"),
        (["memory.window=wide"], r"memory\.window"),
        (["algorithm.group_size=1"], r"algorithm\.group_size=1"),
        (["rollout.top_p=0.9"], r"rollout\.top_p=0\.9"),
        (["rollout.top_k=50"], r"rollout\.top_k=50"),
        (["rollout.temperature=0"], r"rollout\.temperature=0"),
        (["data.synthetic.window=2"], r"data\.synthetic\.window=2"),
        (["+sft.learner.speed=2"], r"sft\.learner\.speed"),
        (["learner.freeze=half"], r"learner\.freeze='half'"),
        (["learner.zero_stage=3"], r"learner\.zero_stage=3"),
        (["sft.late_min=5"], r"sft\.late_min=5"),
        (["sft.pending_thought='{who}'"], r"sft\.pending_thought"),
        (["reward.terms.timing.slack=-1"], r"reward\.terms\.timing\.slack"),
        (["+reward.terms.nope={}"], r"reward\.terms\.nope"),
        (["cluster.address=auto", "run_root=relative"], r"run_root=relative"),
        (["cluster=ray_address"], r"run_root=outputs/quickstart"),
        (["cluster.address='ray://head:10001'"], r"cluster\.address=ray://head:10001: .*ray job submit"),
        (["cluster.address='http://head:8265'"], r"cluster\.address=http://head:8265: .*ray job submit"),
        (["cluster.address=head", "run_root=/shared/run"], r"cluster\.address='head' is neither auto nor HOST:PORT"),
        (["cluster=ray_address", "cluster.num_cpus=4", "run_root=/shared/run"], r"cluster\.num_cpus=4"),
        (["data.train=only.jsonl"], r"data\.train and data\.heldout"),
        (["run_root=''"], "run_root"),
    ],
)
def test_what_is_impossible_is_refused_by_key(overrides, key):
    with pytest.raises((ValueError, HydraException), match=key):
        composed(*overrides)


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
        launch.preflight(composed("algorithm.groups_in_flight=3"))


def test_a_run_may_not_start_from_what_it_replaces(tmp_path):
    start = tmp_path / "checkpoints" / "rl" / "final" / "hf"
    start.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    row = '{"id":"a","video":"a.mp4","end":9,"queries":[{"time":1,"text":"q"}],"answers":[{"time":2,"text":"a"}]}\n'
    (tmp_path / "data" / "train.jsonl").write_text(row)
    config = composed("job=rl", f"run_root={tmp_path}", f"algorithm.init={start}")
    with pytest.raises(ValueError, match=r"algorithm\.init=.*replaces"):
        launch.preflight(config)
    assert start.is_dir()


@pytest.mark.parametrize("worst", [None, float("nan"), 0.1])
def test_a_mismatch_that_is_missing_nan_or_large_fails_the_run(worst):
    summary = {"max_abs_logp_diff": worst, "mean_abs_logp_diff": worst, "logp_diff_tokens": 5}
    with pytest.raises(RuntimeError, match="learner and engine disagree"):
        launch.check_mismatch(composed(), summary)
    launch.check_mismatch(composed(), summary | {"max_abs_logp_diff": 1e-5})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["foo=1"], "foo"),
        (["algorithm.group_size=1"], "algorithm.group_size=1"),
        (["job=eval", "run_root=/nonexistent/run"], "data.heldout"),
        ([*OWN_DATA], "data.train"),
        (["model.path=/nonexistent/model"], "model.path=/nonexistent/model"),
    ],
)
def test_the_command_line_stops_with_the_key_named_and_no_traceback(arguments, message):
    done = subprocess.run(
        [sys.executable, "launch.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
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
    for word in ("job=all", "job=sft", "experiment=quickstart", "run_root=DIR", "memory: full"):
        assert word in done.stdout

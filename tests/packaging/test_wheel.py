"""An installed wheel: what is in it, the command in an empty folder, and what a cluster is sent."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from sightline import __version__
from streams.data.synthetic.questions import SyntheticConfig, generate
from streams.support.files import PACKAGES, PROJECT
from tests.support.project import ROOT
from tests.support.ray_head import RayHead
from tests.support.wheel import Installed, build_wheel, install

OWN = """
import json, os, sys
from pathlib import Path
import numpy as np
import streams
from rewards import StreamOutcome
from streams.memory import LiveTokens, MemoryPolicy, TurnStart, old_video


def record(folder):
    '''Who imports what from where, a file for each process.'''
    found = {name: module.__file__ for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)}
    Path(folder, f"{os.getpid()}.json").write_text(json.dumps({"own": __file__, "modules": found}))


def half(outcome: StreamOutcome, evidence: str) -> np.ndarray:
    record(evidence)
    return np.full(len(outcome.task.answers), 0.5)


class Recent(MemoryPolicy):
    def __init__(self, evidence: str, window: int = 4) -> None:
        record(evidence)
        self.window, self.text_window = window, 0

    def leaving(self, live: LiveTokens, start: TurnStart) -> np.ndarray:
        return old_video(live, start, self.window)
"""
SMALL = (
    "tracking=none",
    "rollout.workers=1",
    "model.tiny.hidden=64",
    "model.tiny.layers=1",
    "model.tiny.mlp=64",
    "learner.warmup_steps=0",
    "sft.learner.warmup_steps=1",
    "reward=weighted",
    "memory.name=custom",
    "memory.target=own_modules:Recent",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with nothing but a user's module."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_modules.py").write_text(OWN)
    return folder


def with_own_modules(evidence: Path) -> tuple[str, str]:
    evidence.mkdir()
    term = f'+reward.terms.half={{target: "own_modules:half", weight: 1, evidence: "{evidence}"}}'
    return term, f'+memory.args={{evidence: "{evidence}"}}'


def records(evidence: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in evidence.glob("*.json")]


def by_workers(found: list[dict]) -> list[dict]:
    """Those of Ray's worker processes."""
    return [record for record in found if record["modules"]["__main__"].endswith("/default_worker.py")]


def ours(record: dict) -> dict[str, str]:
    """Files of our packages by module."""
    return {name: file for name, file in record["modules"].items() if name.partition(".")[0] in PACKAGES}


def test_site_packages_gets_one_name_with_code_configurations_and_assets(wheel):
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"sightline"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    kept = listed.stdout.split() if listed.returncode == 0 else [str(f.relative_to(ROOT)) for f in ROOT.rglob("*.*")]
    wanted = {f"sightline/{name}" for name in kept if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    data = {name for name in wanted if not name.endswith(".py")}
    assert {"sightline/conf/config.yaml", "sightline/evals/transcripts/assets/transcript.css"} <= data
    assert {name for name in names if "__pycache__" not in name} - wanted == {
        "sightline/__init__.py",
        "sightline/__main__.py",
        "sightline/launch.py",
    }
    assert wanted <= names


@pytest.mark.smoke
def test_every_package_of_the_checkout_is_in_the_list_of_packages():
    beside = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    assert beside - {"sightline", "tests", "benchmarks", "examples"} == set(PACKAGES)


def test_the_command_answers_in_an_empty_folder(installed, tmp_path):
    assert {path.name for path in installed.site_packages.iterdir()} == {
        "sightline",
        f"sightline-{__version__}.dist-info",
        "third_party.pth",
    }
    said = installed.run("sightline", "--version", cwd=tmp_path)
    assert said.stdout == f"sightline {__version__}\n"
    code = "import sightline, streams; print(streams.__file__)"
    found = installed.run("python", "-c", code, cwd=tmp_path).stdout.strip()
    assert found == str(installed.site_packages / "sightline" / "streams" / "__init__.py")
    for tool in ("check", "page"):
        said = installed.run("sightline", tool, *(["-h"] if tool == "check" else []), cwd=tmp_path)
        assert f"sightline {tool}" in said.stdout, said.stderr
    assert not list(tmp_path.iterdir())


def test_a_composed_configuration_of_ones_own_runs_and_a_sweep_has_a_folder_for_each_job(installed, tmp_path):
    """job=data needs no actors: the clips are made by the driver."""
    few = ("tracking.enabled=false", "data.synthetic.train_clips=2", "data.synthetic.heldout_per_mode=1")
    composed = installed.run("sightline", "--cfg", "job", "job=data", *few, cwd=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text(composed.stdout)
    mine = ("--config-dir", "mine", "--config-name")
    refused = installed.run("sightline", *mine, "run", "memory=full", cwd=tmp_path)
    assert "memory=full: this configuration chooses no option of memory; with a plus" in refused.stderr
    (tmp_path / "mine" / "short.yaml").write_text("run_root: out/short\n")
    refused = installed.run("sightline", *mine, "short", "seed=3", cwd=tmp_path)
    assert "seed=3: this configuration does not have the key; write `defaults: [config, _self_]`" in refused.stderr
    sweep = (*mine, "run", "-m", "run_root=out/sweep")
    done = installed.run("sightline", *sweep, "seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for seed in (1, 2):
        root = tmp_path / "out" / "sweep" / f"seed-{seed}"
        assert (root / "data" / "train.jsonl").is_file()
        # What is said by one job is in that job's log.
        log = (root / "logs" / "driver.log").read_text()
        assert f"seed={seed}" in log
        assert f"seed={3 - seed}\n" not in log
    again = installed.run("sightline", *sweep, "seed=1,2,3", cwd=tmp_path)
    assert again.stdout.count("finished before, skipped") == 2
    assert (tmp_path / "out" / "sweep" / "seed-3" / "data" / "train.jsonl").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}
    assert {path.name for path in (tmp_path / "out" / "sweep").iterdir()} == {"seed-1", "seed-2", "seed-3"}


def test_a_module_that_would_hide_one_of_ours_is_refused(installed, tmp_path):
    (tmp_path / "rewards.py").touch()
    done = installed.run("sightline", "job=data", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        f"configuration error: {tmp_path / 'rewards.py'} has the name of one of Sightline's own packages" in done.stderr
    )
    (tmp_path / "rewards.py").unlink()
    (tmp_path / "conf").mkdir()  # a folder of YAML files is no package: it hides nothing
    assert installed.run("sightline", "--cfg", "job", cwd=tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_local_run_in_a_users_folder_imports_the_wheel_and_the_users_modules_in_every_process(
    installed, own, tmp_path
):
    evidence = tmp_path / "evidence"
    few = ("data.synthetic.train_clips=4", "data.synthetic.heldout_per_mode=1", "job.stages=[data,rl]")
    steps = (
        "algorithm.steps=1",
        "algorithm.groups_per_step=2",
        "algorithm.group_size=2",
        "algorithm.groups_in_flight=2",
    )
    words = (*SMALL, *few, *steps, *with_own_modules(evidence))
    done = installed.run("sightline", "experiment=quickstart", *words, cwd=own, limit_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((own / "outputs" / "quickstart" / "checkpoints" / "rl" / "final").rglob("model.safetensors"))
    found = records(evidence)
    workers = by_workers(found)
    assert any("rollout.worker" in record["modules"] for record in workers)
    assert any("rewards.scorer" in record["modules"] for record in workers)
    assert len(found) > len(workers)  # the driver's own
    for record in found:
        assert record["own"] == str(own / "own_modules.py")
        assert {Path(file).is_relative_to(installed.site_packages / "sightline") for file in ours(record).values()} == {
            True
        }


SENT = """
import json, os, sys
os.environ["SIGHTLINE_MODULES"] = os.getcwd()
import sightline
sys.path.insert(1, os.getcwd())
import own_modules, ray
from pathlib import Path
from conf.schema import ClusterConfig
from runtime.cluster.connect import connect
from runtime.placing.nodes import own_code

connect(ClusterConfig(address="auto"), "test", Path.cwd() / "runs" / "a")

@ray.remote
def there():
    import own_modules
    from runtime.placing.nodes import own_code
    return own_code(), own_modules.__file__, sorted(str(f.relative_to(".")) for f in Path(".").rglob("*") if f.is_file())

print(json.dumps([own_code(), ray.get(there.remote(), timeout=120)]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_is_sent_the_packages_and_the_users_folder_and_nothing_of_site_packages(installed, own, tmp_path):
    """Once by `ray job submit`, with a token, and once by a driver beside the head."""
    root, evidence = tmp_path / "shared" / "run", tmp_path / "evidence"
    generate(root / "data", SyntheticConfig(train_clips=3, heldout_per_mode=1, max_turns=14))
    words = (*SMALL, *with_own_modules(evidence), "job=sft", "sft.steps=1", "sft.batch=2", f"run_root={root}")
    with RayHead(cpus=4, bin=installed.bin) as head:
        job = head.submit(own, "sightline", *words)
        head.jobs().await_status(job, "SUCCEEDED", limit_s=400)
        assert list(root.glob("checkpoints/sft/**/model.safetensors"))
        resources = next(head.folder.glob("session_latest/runtime_resources"))
        sent = list((resources / "py_modules_files").glob("_ray_pkg_*/"))
        assert {path.name for folder in sent for path in folder.iterdir() if path.is_dir()} == set(PACKAGES)
        files = {
            str(file.relative_to(folder)): file
            for folder in sent
            for file in folder.rglob("*")
            if file.is_file() and file.suffix not in (".pyc", ".lock")
        }
        assert sum(file.stat().st_size for file in files.values()) < 4 * 2**20
        for name in ("streams/memory/policy.py", "conf/config.yaml", "evals/transcripts/assets/transcript.css"):
            assert files[name].read_bytes() == (installed.site_packages / "sightline" / name).read_bytes()

        workers = by_workers(records(evidence))
        assert any("rollout.worker" in record["modules"] for record in workers)
        for record in workers:
            assert re.search(r"/working_dir_files/_ray_pkg_\w+/own_modules\.py$", record["own"])
            assert all("/py_modules_files/" in file for file in ours(record).values())

        # A virtual environment in the user's folder and what runs have written there stay where they are.
        for name in (
            ".venv/lib/python3.11/site-packages/big.py",
            "runs/a/log.txt",
            "env/lib/site-packages/x.py",
            "words.json",
        ):
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            (own / name).write_text("1\n")
        done = head.run(str(installed.bin / "python"), "-c", SENT, cwd=own)
        assert done.returncode == 0, done.stderr
        here, (there, module, files_there) = json.loads(done.stdout.splitlines()[-1])
        assert here[0] == there[0]
        assert here[1] == str(installed.site_packages / "sightline")
        assert "/py_modules_files/" in there[1]
        assert "/working_dir_files/" in module
        assert [name for name in files_there if "__pycache__" not in name] == ["own_modules.py", "words.json"]

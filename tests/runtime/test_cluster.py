"""An existing Ray cluster: jobs submitted with its token, killed, edited, submitted again; nodes that lack something."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from streams.data.synthetic.questions import SyntheticConfig, generate
from tests.support.project import ROOT
from tests.support.ray_head import RayHead

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


SETTINGS = (
    "job=sft",
    "tracking=none",
    "sft.steps=2",
    "sft.batch=2",
    "sft.learner.warmup_steps=1",
    "rollout.workers=1",
    "model.tiny.hidden=64",
    "model.tiny.layers=1",
    "model.tiny.mlp=64",
    # A run takes three of the four CPUs: a second one fits only when the first is gone.
    "cluster.actor_cpus=1",
)
ACTORS = ("learner", "rollout-0", "scorer")


@pytest.fixture(scope="module")
def head():
    with RayHead(cpus=4) as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project to edit."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in (path for path in ROOT.iterdir() if (path / "__init__.py").is_file() or path.name == "conf"):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", folder)
    return folder


@pytest.fixture(scope="module")
def run_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared") / "run"
    generate(root / "data", SyntheticConfig(train_clips=3, heldout_per_mode=1, max_turns=14))
    return root


def edit(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def first_pid(log_file):
    return int(re.search(r" pid (\d+),", log_file.read_text())[1])


def test_a_killed_job_is_submitted_again_and_runs_the_edited_code(head, checkout, run_root):
    command = ("python", "launch.py", f"run_root={run_root}", *SETTINGS)
    jobs = head.jobs()
    first = head.submit(checkout, *command)
    logs = run_root / "logs"
    deadline = time.monotonic() + 120
    while not all((logs / f"{name}.log").is_file() for name in ACTORS):
        assert time.monotonic() < deadline, jobs.logs(first)
        time.sleep(0.2)
    actors = [first_pid(logs / f"{name}.log") for name in ACTORS]
    os.kill(int(jobs.info(first)["driver_info"]["pid"]), signal.SIGKILL)
    killed = time.monotonic()
    jobs.await_status(first, "FAILED", limit_s=30)

    edit(checkout / "streams" / "support" / "actor_log.py", '"%s%s host', '"%s%s edited host')
    edit(checkout / "launch.py", "import logging\n", "import logging\nprint('edited driver')\n")
    second = head.submit(checkout, *command)
    while any(alive(pid) for pid in actors):
        assert time.monotonic() - killed < 60, "the killed run's actors are still there"
        time.sleep(0.1)
    print(f"actors gone after {time.monotonic() - killed:.1f} s")
    jobs.await_status(second, "SUCCEEDED", limit_s=180)

    assert "edited driver" in jobs.logs(second)
    for name in ACTORS:
        starts = [line for line in (logs / f"{name}.log").read_text().splitlines() if " starts:" in line]
        assert len(starts) == 2
        assert [" edited host " in line for line in starts] == [False, True]
    assert list(run_root.glob("checkpoints/sft/**/model.safetensors"))
    assert not list(run_root.glob(".preflight-*"))


def test_the_job_api_asks_for_the_token(head):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=30)
    assert refused.value.code in (401, 403)


CONNECT = """
import sys
from pathlib import Path
import ray
from conf.schema import ClusterConfig
from runtime.cluster.connect import connect
try:
    connect(ClusterConfig(address=sys.argv[1], num_cpus=int(sys.argv[2])), "test", Path("/nowhere"))
    print("CPUs", ray.cluster_resources()["CPU"])
except ConnectionError as error:
    print(error)
"""


def test_a_local_run_beside_a_cluster_stays_local_and_a_wrong_token_is_said(head):
    """`head.run` sets RAY_ADDRESS, which Ray by itself would follow. Ray tries a wrong token for 20 s."""
    wrong = ("env", f"RAY_AUTH_TOKEN={'0' * 64}")
    with ThreadPoolExecutor() as pool:
        local = pool.submit(head.run, sys.executable, "-c", CONNECT, "", "1", cwd=ROOT)
        refused = pool.submit(head.run, *wrong, sys.executable, "-c", CONNECT, "auto", "0", cwd=ROOT)
    assert local.result().stdout.strip().endswith("CPUs 1.0"), local.result().stderr
    said = refused.result().stdout
    assert "cluster.address=auto: Failed to connect" in said, refused.result().stderr
    assert "set RAY_AUTH_MODE=token and the head's token here" in said


def launch_here(head, run_root, *overrides):
    """A driver on the head's machine, outside of a job: it uploads its own code."""
    settings = (*SETTINGS, f"run_root={run_root}", "cluster=ray_address", f"cluster.address={head.address}")
    return head.run(sys.executable, "launch.py", *settings, *overrides, cwd=ROOT, limit_s=240)


def private_mounts():
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not private_mounts(), reason="needs a mount namespace (root), to give a node other files")
def test_a_node_that_sees_other_files_and_versions_is_named_with_all_of_it(head, run_root, tmp_path):
    """A second node on this machine, in a mount namespace with an empty run_root, no videos and an older package."""
    package = metadata.distribution("transformers")
    record = next(package.locate_file(file) for file in package.files if file.name == "METADATA")
    older = tmp_path / "METADATA"
    older.write_text(record.read_text().replace(f"Version: {package.version}", "Version: 5.0.0"))
    videos = tmp_path / "videos"
    generate(videos, SyntheticConfig(train_clips=3, heldout_per_mode=1, max_turns=14))
    other = run_root.parent / "other"
    script = (
        f"mount --make-rprivate / && mount -t tmpfs none {other.parent} && mkdir {other} && "
        f'mount --bind {older} {record} && mount -t tmpfs none {videos} && exec "$@"'
    )
    head.add_node(2, wrapper=("unshare", "-m", "sh", "-c", script, "node"))
    done = launch_here(
        head,
        other,
        "data=jsonl",
        f"data.train={videos / 'train.jsonl'}",
        f"data.heldout={videos / 'heldout.jsonl'}",
        "rollout.workers=4",
        "rollout.min_workers=4",
        "cluster.actor_cpus=1.5",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "configuration error: the cluster is not ready for this run, " in done.stderr
    problems = re.findall(r"^  \d+\. (.*)$", done.stderr, re.MULTILINE)
    assert problems[0].startswith("the actors need 9 CPUs (learner 1.5 + rollout worker 0 1.5 + ")
    assert "but the cluster has 6: lower rollout.min_workers" in problems[0]
    # The head sees what the driver sees: only the other node is named.
    for problem in problems[1:]:
        assert re.match(r"node \S+ \(.*, \w{6}\): ", problem)
    for expected in (
        rf"run_root: {other} there is not the driver's: a file that the driver just wrote is not in it",
        r"transformers is 5\.0\.0 there, .* on the driver: install the same version",
        rf"data\.train: {videos / 'train.jsonl'}: No such file",
        rf"data\.heldout: {videos / 'heldout.jsonl'}: No such file",
        rf"data\.train, a video: .*{videos}/.*: No such file.*Put it where every node sees it",
        rf"data\.heldout, a video: .*{videos}/.*: No such file",
    ):
        assert sum(bool(re.search(expected, problem)) for problem in problems) == 1, (expected, problems)
    assert len(problems) == 7
    assert not list(other.glob(".preflight-*"))
